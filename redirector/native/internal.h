/* What session.c, login.c, issue.c, silence.c and answer.c share. Everything here belongs to the thread of the
 * session, but for the members that say otherwise. */
#ifndef CSVFS_INTERNAL_H
#define CSVFS_INTERNAL_H

#include <pthread.h>
#include <sys/types.h>

#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

#include "queue.h"
#include "session.h"

enum { CSV_WIDEN_LEAST_MS = 1000 };

enum csv_phase {
    CSV_CONNECTING, /* until the target's answer to the login */
    CSV_UP,
    CSV_DOWN, /* no libiscsi context: every submission ends as CSV_UNKNOWN */
};

/* One command on the wire: a request, or the part of it that fits max_transfer_bytes. */
struct csv_piece {
    struct csv_piece *previous, *next; /* in flight, oldest first; or free, by `next` */
    struct csv_session *session;
    struct csv_request *request;
    /* Made once and used again: libiscsi's PDUs point to the task, it to `data`, so both live as long
     * as the context, and a free piece has no data that a broken target could still ask for. */
    struct scsi_task *task;
    struct scsi_iovec data;
    uint64_t deadline_ms; /* UINT64_MAX: as long as commands issued before it are answered */
    bool answered; /* refused, but libiscsi may still hold Data-Out PDUs that point to its data */
};

struct csv_session {
    struct csv_config config;
    char portal[CSV_TEXT_BYTES], target[CSV_TEXT_BYTES], initiator[CSV_TEXT_BYTES];
    char user[CSV_TEXT_BYTES], password[CSV_TEXT_BYTES];

    struct iscsi_context *context;
    enum csv_phase phase;
    bool losing;     /* the context must go, at the next safe place; callbacks only set this */
    bool destroying; /* libiscsi is cancelling what it still has */
    bool redirected; /* the target named another portal to log in to */
    int redirects;
    uint64_t login_deadline_ms;
    struct csv_request *login;

    struct csv_request *pending, *pending_last; /* not yet (wholly) on the wire, in order */
    struct csv_piece pieces[CSV_MAX_IN_FLIGHT];
    struct csv_piece *free_pieces, *oldest, *newest;
    uint32_t in_flight;
    uint32_t answered; /* pieces in flight that are */
    uint32_t window;  /* in_flight stays below */
    uint32_t proven;  /* so many in flight never met a closed window */
    uint64_t widen_at_ms, widen_every_ms;
    uint64_t earliest_deadline_ms; /* of any piece, a lower bound */
    uint64_t oldest_since_ms;      /* when `oldest` became the oldest */
    uint64_t no_data; /* what the end of a READ's buffer holds until data comes; random */
    uint32_t block_bytes, max_transfer_bytes; /* set by the owner before the first READ */

    uint64_t now_ms, heard_ms; /* the last byte from the target */
    uint64_t sent_ms;          /* the last time the socket took data after it had been full */
    bool nop_out, probe_out; /* pings that await an answer; see silence.c */
    uint64_t ping_sent_ms;   /* or when something was last seen to move before it */
    uint64_t watch_at_ms;    /* look again whether it does */
    uint64_t restless_ms;    /* when the target was last silent for half of ping_timeout_ms */
    int queued_bytes;
    uint32_t ended_tag, ended_number; /* ITT and CmdSN of the command that was answered last */
    bool logged_out;
    char answered_text[CSV_TEXT_BYTES]; /* libiscsi's words for the last refusal; it keeps them */

    /* Shared with other threads. */
    pthread_t thread;
    pid_t process; /* that has the thread: a forked child has none */
    bool joined;
    int submit_fd, complete_fd;
    struct csv_queue submitted, completed;
    atomic_bool sleeping; /* the thread is about to poll: a submission must wake it */
    atomic_bool abort_wanted, close_wanted, lost;
    char text[CSV_TEXT_BYTES]; /* written once, before `lost` is */
    uint32_t silent_ms;        /* the same */
    atomic_uint_fast64_t commands, pings;
    atomic_uint_fast32_t shown_in_flight, peak_in_flight, shown_window, patience_ms;
};

/* session.c */
void csv_lose(struct csv_session *session, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void csv_lose_context(struct csv_session *session);
void csv_finish(struct csv_session *session, struct csv_request *request);

/* login.c */
bool csv_login_start(struct csv_session *session);
void csv_login_redirect(struct csv_session *session);
void csv_context_destroy(struct csv_session *session);

/* Where the data of a READ ends. */
static inline char *csv_last_bytes(const struct csv_piece *piece)
{
    return (char *)piece->data.iov_base + piece->data.iov_len - sizeof piece->session->no_data;
}

/* issue.c */
void csv_enqueue(struct csv_session *session, struct csv_request *request);
void csv_drop_pending_head(struct csv_session *session);
void csv_issue(struct csv_session *session);

/* silence.c */
uint64_t csv_next_look_ms(const struct csv_session *session);
void csv_check_silence(struct csv_session *session);

/* answer.c; libiscsi calls csv_on_..., with the piece (pings: the session) as `private` */
void csv_on_scsi(struct iscsi_context *context, int status, void *data, void *private);
void csv_on_task_management(struct iscsi_context *context, int status, void *data, void *private);
void csv_on_logout(struct iscsi_context *context, int status, void *data, void *private);
void csv_on_nop(struct iscsi_context *context, int status, void *data, void *private);
void csv_on_probe(struct iscsi_context *context, int status, void *data, void *private);
void csv_show_in_flight(struct csv_session *session);
bool csv_unsent(struct csv_session *session);
void csv_settle(struct csv_session *session);
uint64_t csv_next_deadline_ms(const struct csv_session *session);
void csv_check_deadlines(struct csv_session *session);
void csv_forgive(struct csv_session *session, uint64_t slept_ms);
void csv_fail_everything(struct csv_session *session);

#endif
