/* The heartbeats of a node, from a thread of their own: a datagram to every peer (lockmgr/PROTOCOL.md,
 * "Heartbeat datagram"), and a write of the own heartbeat block on one session.
 *
 * The owner says what they show, to whom and where; the thread sends one every `interval_ms`, under a
 * sequence number that grows with each, but only while the owner has stamped within the last
 * `alive_ms`: an owner that hangs falls silent, a busy one does not. Confirmed writes renew the lease:
 * until `lease_ms` after the write was sent.
 *
 * All times are of CLOCK_BOOTTIME, which goes on while the host is suspended. Every function may be
 * called from any thread, and none waits for the network or the target.
 */
#ifndef CSVFS_PULSE_H
#define CSVFS_PULSE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>

#include "session.h"

struct csv_pulse;

enum {
    CSV_BLOCK_BYTES = 4096,
    CSV_CLUSTER_ID_BYTES = 16,
    CSV_SECRET_BYTES = 32,
    CSV_DATAGRAM_BYTES = 72,
};

struct csv_pulse_config {
    int socket; /* UDP; a duplicate is made */
    uint8_t cluster_id[CSV_CLUSTER_ID_BYTES];
    uint32_t interval_ms, alive_ms, lease_ms;
};

struct csv_life {
    uint8_t slot;
    uint32_t incarnation, flags;
    uint64_t epoch, hears;
};

struct csv_target {
    struct sockaddr_storage address;
    socklen_t length;
};

/* What became of writes since the last csv_pulse_reap. */
struct csv_pulse_news {
    uint64_t written; /* how many */
    uint64_t key;     /* of the session of all of them, and of the failure */
    int64_t sent_ns;  /* when the last of them was sent */
    bool failed;      /* the last one: the session is not written on any more */
    enum csv_outcome outcome;
    int status;
    uint32_t residual;
    uint8_t sense_bytes;
    uint8_t sense[CSV_SENSE_BYTES];
};

struct csv_pulse_statistics {
    uint64_t sent;     /* times that datagrams went out, whatever the number of peers */
    uint64_t not_sent; /* datagrams that the socket did not take */
    uint64_t written, failed, silences;
    int64_t gap_ns, gap_most_ns;     /* between two times */
    int64_t write_ns, write_most_ns; /* from sending to the answer */
};

/* NULL (errno set) if there is no thread or descriptor to be had. */
struct csv_pulse *csv_pulse_open(const struct csv_pulse_config *config);

/* `targets` is malloced, and the pulse's from now on, also if it fails. */
void csv_pulse_address(struct csv_pulse *pulse, const uint8_t secret[CSV_SECRET_BYTES],
                       struct csv_target *targets, size_t count);

/* `block`: CSV_BLOCK_BYTES, as it is to be written but for version, sequence and checksum. `now`: do
 * not wait for the next time. */
void csv_pulse_show(struct csv_pulse *pulse, const struct csv_life *life, const uint8_t *block,
                    bool now);

void csv_pulse_stamp(struct csv_pulse *pulse);

/* Write the block there from now on, at once for the first time; csv_pulse_detach must come before
 * csv_session_close. `key` only comes back in the news. */
void csv_pulse_attach(struct csv_pulse *pulse, struct csv_session *session, uint64_t key,
                      uint64_t lba);

/* That session (NULL: any) is not written on any more, and what is on its way there is not told of and
 * renews nothing. */
void csv_pulse_detach(struct csv_pulse *pulse, const struct csv_session *session);

/* A write is on its way, on whatever session. */
bool csv_pulse_writing(struct csv_pulse *pulse);

/* A sequence number for a heartbeat that the owner sends itself. */
uint64_t csv_pulse_next_sequence(struct csv_pulse *pulse);

/* When the lease ends; INT64_MIN: there is none. */
int64_t csv_pulse_lease_ns(const struct csv_pulse *pulse);

/* Readable as soon as there is news. */
int csv_pulse_fd(const struct csv_pulse *pulse);
void csv_pulse_reap(struct csv_pulse *pulse, struct csv_pulse_news *news);

void csv_pulse_statistics(struct csv_pulse *pulse, struct csv_pulse_statistics *statistics);

/* For good: nothing more is sent, there is no lease. */
void csv_pulse_stop(struct csv_pulse *pulse);

/* End the thread. No session may have a write of it on its way: all are closed. */
void csv_pulse_free(struct csv_pulse *pulse);

#endif
