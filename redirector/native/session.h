/* One iSCSI session (I_T nexus, RFC 7143) served by one thread of its own, over libiscsi.
 *
 * Anybody may submit requests from any thread; the session's thread issues them, many at a time, and
 * hands each one back exactly once, with one of three outcomes:
 *
 *   CSV_DONE      the target did it
 *   CSV_REFUSED   the target answered "no" (status and sense, or a task management response): nothing
 *                 was done, the session lives on
 *   CSV_UNKNOWN   no answer, and none will come: it may have been carried out, and may yet be. The
 *                 session is lost: its connection is closed and every other request ends so too.
 *
 * Nothing is ever sent twice, and no connection is ever made again. Data goes straight between the
 * socket and the request's buffer, which must stay valid and unmoved until the request comes back;
 * when it has come back the session touches neither any more.
 *
 * Request life: owner fills it -> csv_session_submit -> (the session owns it) -> `complete` is called
 * on the session's thread, or, if that is NULL, csv_session_reap returns it -> owner again.
 */
#ifndef CSVFS_SESSION_H
#define CSVFS_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct csv_session;

enum {
    CSV_MAX_IN_FLIGHT = 128, /* commands that a session may have on the wire */
    CSV_SENSE_BYTES = 96,
    CSV_TEXT_BYTES = 256,
};

enum csv_op {
    CSV_LOGIN,  /* the request given to csv_session_open */
    CSV_READ,   /* READ(16), cut at max_transfer_bytes */
    CSV_WRITE,  /* WRITE(16), cut at max_transfer_bytes */
    CSV_SCSI,   /* the command block in `cdb` */
    CSV_TASK,   /* task management function `function` for the logical unit */
    CSV_LOGOUT, /* issued when nothing else is in flight; nothing may follow it */
};

enum csv_direction { CSV_NO_DATA, CSV_DATA_IN, CSV_DATA_OUT };

enum csv_outcome { CSV_DONE, CSV_REFUSED, CSV_UNKNOWN };

struct csv_request {
    struct csv_request *next;
    void (*complete)(struct csv_request *); /* on the session's thread; NULL: to csv_session_reap */

    /* What to do. */
    enum csv_op op;
    enum csv_direction direction; /* CSV_SCSI */
    bool fua;                     /* CSV_WRITE: Force Unit Access */
    uint8_t function;             /* CSV_TASK: RFC 7143 11.5.1 */
    uint8_t cdb_bytes;            /* CSV_SCSI */
    uint8_t cdb[16];
    uint64_t lba;       /* CSV_READ, CSV_WRITE */
    void *buffer;       /* NULL if there is no data */
    uint32_t length;    /* of the buffer, bytes; a multiple of the block for READ and WRITE */
    uint32_t timeout_ms; /* from when it is issued; 0: command_timeout_ms, as that says */

    /* What came of it. */
    enum csv_outcome outcome;
    int status; /* SAM status; CSV_TASK: response; CSV_LOGIN: status class and detail (RFC 7143
                   11.13.5), 0 if the target was not reached */
    uint32_t residual; /* bytes of `length` that the target did not transfer */
    uint8_t sense_bytes;
    uint8_t sense[CSV_SENSE_BYTES]; /* SPC-4 4.5, without iSCSI's length field */

    /* The session's own. */
    uint32_t issued;      /* bytes of `length` that were put on the wire */
    uint32_t outstanding; /* commands on the wire */
};

struct csv_config {
    const char *portal; /* "192.0.2.1:3260" or "[2001:db8::1]:3260", numeric */
    const char *target; /* iSCSI name */
    const char *initiator;
    const char *user;     /* "" without CHAP */
    const char *password; /* "" without CHAP */
    uint64_t isid;        /* 48 bits; see csv_isid_valid */
    uint32_t lun;         /* at most 16383 */
    bool header_digest;          /* insist on CRC32C header digests */
    uint32_t login_timeout_ms;   /* connect and login together */
    uint32_t command_timeout_ms; /* so long without an answer to the oldest command, it is lost */
    uint32_t ping_interval_ms;   /* ping after so long without a byte from the target; 0: never */
    uint32_t ping_timeout_ms;    /* so long after a ping without a byte, it is lost, but for: */
    uint32_t patience_ms;        /* ping_timeout_ms to begin with, if this is longer, until */
    uint32_t calm_ms;            /* the target was not silent for half of ping_timeout_ms so long */
    uint32_t max_in_flight;      /* at most CSV_MAX_IN_FLIGHT; the target's window may be smaller */
};

struct csv_statistics {
    uint64_t commands;      /* that were answered */
    uint64_t pings;         /* that were answered */
    uint32_t in_flight;     /* commands on the wire */
    uint32_t peak_in_flight;
    uint32_t window;        /* how many the session now dares to have on the wire */
    uint32_t patience_ms;   /* for a silence, now */
};

/* libiscsi can express every ISID of type 00b, and those of 01b and 10b whose low six bits of the
 * first byte are 0. */
bool csv_isid_valid(uint64_t isid);

/* Start the thread and log in; `login` comes back when that has ended. NULL (errno set) if there is
 * no thread or descriptor to be had: then `login` does not come back. */
struct csv_session *csv_session_open(const struct csv_config *config, struct csv_request *login);

/* Once, before the first READ or WRITE. */
void csv_session_set_geometry(struct csv_session *session, uint32_t block_bytes,
                              uint32_t max_transfer_bytes);

void csv_session_submit(struct csv_session *session, struct csv_request *request);

/* Readable as soon as csv_session_reap has something, or the session was lost: ask for both. */
int csv_session_fd(const struct csv_session *session);

/* The requests that ended, in the order in which they did, linked by `next`. One thread at a time. */
struct csv_request *csv_session_reap(struct csv_session *session);

/* Drop the connection now: every request ends as CSV_UNKNOWN. Never blocks. */
void csv_session_abort(struct csv_session *session);

/* True once no command can be answered any more. */
bool csv_session_lost(const struct csv_session *session);

/* Why it is lost, in words; "" before. */
const char *csv_session_text(const struct csv_session *session);

/* Where it logged in, after any redirection: valid once `login` has come back. */
const char *csv_session_portal(const struct csv_session *session);

/* How long the silence was waited out for which it is lost, ms; 0 if it is lost for another reason, or
 * not. */
uint32_t csv_session_silent_ms(const struct csv_session *session);

void csv_session_statistics(struct csv_session *session, struct csv_statistics *statistics);

/* (In a forked child, which has no such thread, this only closes its descriptors.)
 * Abort if need be and end the thread: takes microseconds, not round trips. Requests that ended can
 * still be reaped, and must be, before csv_session_free. */
void csv_session_close(struct csv_session *session);
void csv_session_free(struct csv_session *session);

#endif
