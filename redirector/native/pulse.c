/* The thread that sends heartbeats, and what its owner tells it.
 *
 * Invariants
 *   - everything but `stamp_ns`, `silent` and `lease_ns` is read and written under `lock`, which is
 *     never held while anything is waited for; who holds it takes no other lock
 *   - `request` and `on_wire` are the session's while `writing`; at most one write is on its way
 *   - `session` is one that its owner has not begun to close
 *   - the lease is renewed only by a write on the session that is attached at that moment, counted
 *     from before that write was submitted; after `stopped` it is INT64_MIN for ever
 *
 * The thread asks for the lowest real-time priority, so that a host whose processors are all busy does
 * not fall silent: it runs for microseconds, twice a second. Without that right it does without.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "pulse.h"

enum {
    STACK_BYTES = 128 << 10,
    MS = 1000000,
    /* Datagram: lockmgr/cluster/datagram.py. */
    BODY_BYTES = 40,
    DATAGRAM_VERSION = 1,
    /* Block: csvfs/FORMAT.md, sections 2 and 5. */
    CRC_OFFSET = 8,
    CRC_END = 12,
    VERSION_OFFSET = 40,
    SEQUENCE_OFFSET = 72,
};

static const int64_t NEVER = INT64_MAX;

/* Where datagrams go: given away as a whole, so that the thread sends without the lock. */
struct targets {
    int users;
    size_t count;
    struct csv_target *each;
};

struct csv_pulse {
    struct csv_pulse_config config;
    pthread_t thread;
    pid_t process; /* that has the thread: a forked child has none */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int news_fd;

    atomic_int_fast64_t stamp_ns, lease_ns;
    atomic_bool silent; /* the thread waits for a stamp */

    bool stopped, closing;
    bool shown;   /* there is something to show */
    bool at_once;
    int64_t due_ns; /* CLOCK_MONOTONIC */
    struct csv_life life;
    uint8_t block[CSV_BLOCK_BYTES];
    uint8_t secret[CSV_SECRET_BYTES];
    struct targets *targets;
    uint64_t sequence;

    struct csv_session *session;
    uint64_t key, lba;
    uint64_t attachment; /* grows with each session */
    bool writing;
    struct csv_request request;
    uint8_t on_wire[CSV_BLOCK_BYTES];
    uint64_t writing_for; /* attachment */
    int64_t written_ns;   /* when it was sent */

    struct csv_pulse_news news;
    struct csv_pulse_statistics statistics;
    int64_t sent_ns;
};

static int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void tell(struct csv_pulse *pulse)
{
    uint64_t one = 1;
    while (write(pulse->news_fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

/* -- numbers ---------------------------------------------------------------------------------- */

static void store_be(uint8_t *to, uint64_t value, int bytes)
{
    while (bytes--) {
        to[bytes] = (uint8_t)value;
        value >>= 8;
    }
}

static void store_le(uint8_t *to, uint64_t value, int bytes)
{
    for (; bytes--; value >>= 8)
        *to++ = (uint8_t)value;
}

/* CRC-32C (Castagnoli), bit by bit from a table of 16: a block twice a second needs no more. */
static uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t bytes)
{
    static const uint32_t table[16] = {
        0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3,
        0x61c69362, 0x7198540d, 0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9,
        0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
    };

    crc = ~crc;
    while (bytes--) {
        crc ^= *data++;
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

static bool make_datagram(const struct csv_pulse *pulse, uint64_t sequence,
                          uint8_t datagram[CSV_DATAGRAM_BYTES])
{
    uint8_t signed_bytes[CSV_CLUSTER_ID_BYTES + BODY_BYTES];
    uint8_t *body = signed_bytes + CSV_CLUSTER_ID_BYTES;
    unsigned length = 0;

    memcpy(signed_bytes, pulse->config.cluster_id, CSV_CLUSTER_ID_BYTES);
    memcpy(body, "LMHB", 4);
    body[4] = DATAGRAM_VERSION;
    body[5] = pulse->life.slot;
    body[6] = body[7] = 0;
    store_be(body + 8, pulse->life.incarnation, 4);
    store_be(body + 12, pulse->life.flags, 4);
    store_be(body + 16, sequence, 8);
    store_be(body + 24, pulse->life.epoch, 8);
    store_be(body + 32, pulse->life.hears, 8);
    memcpy(datagram, body, BODY_BYTES);
    return HMAC(EVP_sha256(), pulse->secret, CSV_SECRET_BYTES, signed_bytes, sizeof signed_bytes,
                datagram + BODY_BYTES, &length) &&
           length == CSV_DATAGRAM_BYTES - BODY_BYTES;
}

static void make_block(struct csv_pulse *pulse, uint64_t sequence)
{
    uint8_t *block = pulse->on_wire;

    memcpy(block, pulse->block, CSV_BLOCK_BYTES);
    store_le(block + SEQUENCE_OFFSET, sequence, 8);
    store_le(block + VERSION_OFFSET, sequence + 1, 8);
    uint32_t crc = crc32c(0, block, CRC_OFFSET);
    store_le(block + CRC_OFFSET, crc32c(crc, block + CRC_END, CSV_BLOCK_BYTES - CRC_END), 4);
}

/* -- writing ---------------------------------------------------------------------------------- */

static void note_failure(struct csv_pulse *pulse, const struct csv_request *request)
{
    struct csv_pulse_news *news = &pulse->news;

    pulse->session = NULL;
    pulse->statistics.failed++;
    news->key = pulse->key;
    news->failed = true;
    news->outcome = request->outcome;
    news->status = request->status;
    news->residual = request->residual;
    news->sense_bytes = request->sense_bytes;
    memcpy(news->sense, request->sense, sizeof news->sense);
}

static void note_written(struct csv_pulse *pulse)
{
    struct csv_pulse_statistics *statistics = &pulse->statistics;
    int64_t until_ns = pulse->written_ns + (int64_t)pulse->config.lease_ms * MS;

    statistics->written++;
    statistics->write_ns = clock_ns(CLOCK_BOOTTIME) - pulse->written_ns;
    if (statistics->write_ns > statistics->write_most_ns)
        statistics->write_most_ns = statistics->write_ns;
    if (until_ns > atomic_load(&pulse->lease_ns))
        atomic_store(&pulse->lease_ns, until_ns);
    pulse->news.key = pulse->key;
    pulse->news.written++;
    pulse->news.sent_ns = pulse->written_ns;
}

/* On the session's thread. */
static void on_written(struct csv_request *request)
{
    struct csv_pulse *pulse = (struct csv_pulse *)((char *)request - offsetof(struct csv_pulse, request));
    bool counts;

    pthread_mutex_lock(&pulse->lock);
    pulse->writing = false;
    counts = pulse->session && pulse->writing_for == pulse->attachment && !pulse->stopped;
    if (counts && request->outcome == CSV_DONE && !request->residual)
        note_written(pulse);
    else if (counts)
        note_failure(pulse, request);
    if (!counts && pulse->session && !pulse->stopped) { /* it kept the next session waiting */
        pulse->at_once = true;
        pthread_cond_signal(&pulse->changed);
    }
    if (counts) /* with the lock: who frees the pulse has seen `writing` end under it */
        tell(pulse);
    pthread_mutex_unlock(&pulse->lock);
}

static void submit(struct csv_pulse *pulse, uint64_t sequence)
{
    if (!pulse->session || pulse->writing)
        return;
    make_block(pulse, sequence);
    pulse->request = (struct csv_request){
        .complete = on_written,
        .op = CSV_WRITE,
        .lba = pulse->lba,
        .buffer = pulse->on_wire,
        .length = CSV_BLOCK_BYTES,
    };
    pulse->writing = true;
    pulse->writing_for = pulse->attachment;
    pulse->written_ns = clock_ns(CLOCK_BOOTTIME);
    csv_session_submit(pulse->session, &pulse->request);
}

/* -- sending ---------------------------------------------------------------------------------- */

static void release(struct targets *targets)
{
    if (targets && !--targets->users) {
        free(targets->each);
        free(targets);
    }
}

static void note_sent(struct csv_pulse *pulse)
{
    struct csv_pulse_statistics *statistics = &pulse->statistics;
    int64_t now_ns = clock_ns(CLOCK_BOOTTIME);

    if (statistics->sent++)
        statistics->gap_ns = now_ns - pulse->sent_ns;
    if (statistics->gap_ns > statistics->gap_most_ns)
        statistics->gap_most_ns = statistics->gap_ns;
    pulse->sent_ns = now_ns;
}

/* To everybody. Lets the lock go meanwhile. */
static void send_datagrams(struct csv_pulse *pulse, uint64_t sequence)
{
    uint8_t datagram[CSV_DATAGRAM_BYTES];
    struct targets *targets = pulse->targets;
    uint64_t lost = 0;

    if (!targets || !make_datagram(pulse, sequence, datagram))
        return;
    targets->users++;
    note_sent(pulse);
    pthread_mutex_unlock(&pulse->lock);
    for (size_t i = 0; i < targets->count; i++) {
        const struct csv_target *target = &targets->each[i];
        if (sendto(pulse->config.socket, datagram, sizeof datagram, MSG_DONTWAIT | MSG_NOSIGNAL,
                   (const struct sockaddr *)&target->address, target->length) < 0)
            lost++; /* as if lost on its way */
    }
    pthread_mutex_lock(&pulse->lock);
    pulse->statistics.not_sent += lost;
    release(targets);
}

static bool owner_lives(const struct csv_pulse *pulse)
{
    return clock_ns(CLOCK_BOOTTIME) - atomic_load(&pulse->stamp_ns) <
           (int64_t)pulse->config.alive_ms * MS;
}

/* One heartbeat, if the owner lives; else wait for its stamp. */
static void beat(struct csv_pulse *pulse, int64_t now_ns)
{
    int64_t interval_ns = (int64_t)pulse->config.interval_ms * MS;

    if (pulse->at_once || pulse->due_ns + interval_ns <= now_ns)
        pulse->due_ns = now_ns;
    pulse->due_ns += interval_ns;
    pulse->at_once = false;
    /* A stamper looks at `silent` after its stamp, this thread at the stamp after `silent`. */
    atomic_store(&pulse->silent, true);
    if (!owner_lives(pulse)) {
        pulse->due_ns = NEVER;
        pulse->statistics.silences++;
        return;
    }
    atomic_store(&pulse->silent, false);
    uint64_t sequence = ++pulse->sequence;
    submit(pulse, sequence);
    send_datagrams(pulse, sequence);
}

static void wait_until(struct csv_pulse *pulse, int64_t when_ns)
{
    struct timespec until = {.tv_sec = when_ns / 1000000000, .tv_nsec = when_ns % 1000000000};

    if (when_ns == NEVER)
        pthread_cond_wait(&pulse->changed, &pulse->lock);
    else
        pthread_cond_timedwait(&pulse->changed, &pulse->lock, &until);
}

static void *run(void *argument)
{
    struct csv_pulse *pulse = argument;
    struct sched_param lowest = {.sched_priority = sched_get_priority_min(SCHED_RR)};

    if (pthread_setschedparam(pthread_self(), SCHED_RR, &lowest))
        setpriority(PRIO_PROCESS, (id_t)gettid(), -10); /* or not even that */
    pthread_mutex_lock(&pulse->lock);
    while (!pulse->closing) {
        int64_t now_ns = clock_ns(CLOCK_MONOTONIC);
        if (!pulse->shown || pulse->stopped)
            wait_until(pulse, NEVER);
        else if (pulse->at_once || now_ns >= pulse->due_ns)
            beat(pulse, now_ns);
        else
            wait_until(pulse, pulse->due_ns);
    }
    pthread_mutex_unlock(&pulse->lock);
    return NULL;
}

/* -- on any thread ---------------------------------------------------------------------------- */

static int start_thread(struct csv_pulse *pulse)
{
    pthread_attr_t attributes;
    sigset_t all, before;

    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&pulse->thread, &attributes, run, pulse);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (!error)
        pthread_setname_np(pulse->thread, "csvfs-pulse");
    return error;
}

static void make_locks(struct csv_pulse *pulse)
{
    pthread_mutexattr_t of_lock;
    pthread_condattr_t of_changed;

    pthread_mutexattr_init(&of_lock);
    pthread_mutexattr_setprotocol(&of_lock, PTHREAD_PRIO_INHERIT); /* the thread is more urgent */
    pthread_mutex_init(&pulse->lock, &of_lock);
    pthread_mutexattr_destroy(&of_lock);
    pthread_condattr_init(&of_changed);
    pthread_condattr_setclock(&of_changed, CLOCK_MONOTONIC);
    pthread_cond_init(&pulse->changed, &of_changed);
    pthread_condattr_destroy(&of_changed);
}

static void free_all(struct csv_pulse *pulse)
{
    if (pulse->config.socket >= 0)
        close(pulse->config.socket);
    if (pulse->news_fd >= 0)
        close(pulse->news_fd);
    release(pulse->targets);
    explicit_bzero(pulse->secret, sizeof pulse->secret);
    free(pulse);
}

struct csv_pulse *csv_pulse_open(const struct csv_pulse_config *config)
{
    struct csv_pulse *pulse = calloc(1, sizeof *pulse);

    if (!pulse)
        return NULL;
    pulse->config = *config;
    pulse->config.socket = fcntl(config->socket, F_DUPFD_CLOEXEC, 0);
    pulse->news_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pulse->process = getpid();
    atomic_store(&pulse->stamp_ns, clock_ns(CLOCK_BOOTTIME));
    atomic_store(&pulse->lease_ns, INT64_MIN);
    int error = pulse->config.socket < 0 || pulse->news_fd < 0 ? errno : 0;
    if (!error) {
        make_locks(pulse);
        error = start_thread(pulse);
    }
    if (error) {
        free_all(pulse);
        errno = error;
        return NULL;
    }
    return pulse;
}

void csv_pulse_address(struct csv_pulse *pulse, const uint8_t secret[CSV_SECRET_BYTES],
                       struct csv_target *targets, size_t count)
{
    struct targets *given = malloc(sizeof *given);

    if (!given) {
        free(targets);
        return;
    }
    *given = (struct targets){.users = 1, .count = count, .each = targets};
    pthread_mutex_lock(&pulse->lock);
    memcpy(pulse->secret, secret, CSV_SECRET_BYTES);
    struct targets *before = pulse->targets;
    pulse->targets = given;
    release(before);
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_show(struct csv_pulse *pulse, const struct csv_life *life, const uint8_t *block,
                    bool now)
{
    pthread_mutex_lock(&pulse->lock);
    pulse->life = *life;
    memcpy(pulse->block, block, CSV_BLOCK_BYTES);
    if (now || !pulse->shown) {
        pulse->shown = pulse->at_once = true;
        pthread_cond_signal(&pulse->changed);
    }
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_stamp(struct csv_pulse *pulse)
{
    atomic_store(&pulse->stamp_ns, clock_ns(CLOCK_BOOTTIME));
    if (!atomic_load(&pulse->silent))
        return;
    pthread_mutex_lock(&pulse->lock);
    if (atomic_exchange(&pulse->silent, false)) {
        pulse->at_once = true;
        pthread_cond_signal(&pulse->changed);
    }
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_attach(struct csv_pulse *pulse, struct csv_session *session, uint64_t key,
                      uint64_t lba)
{
    pthread_mutex_lock(&pulse->lock);
    pulse->session = session;
    pulse->key = key;
    pulse->lba = lba;
    pulse->attachment++;
    pulse->news = (struct csv_pulse_news){0}; /* of another session */
    pulse->at_once = true;
    pthread_cond_signal(&pulse->changed);
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_detach(struct csv_pulse *pulse, const struct csv_session *session)
{
    if (pulse->process != getpid()) /* the lock may have been taken when it was copied */
        return;
    pthread_mutex_lock(&pulse->lock);
    if (!session || session == pulse->session)
        pulse->session = NULL;
    pthread_mutex_unlock(&pulse->lock);
}

bool csv_pulse_writing(struct csv_pulse *pulse)
{
    pthread_mutex_lock(&pulse->lock);
    bool writing = pulse->writing;
    pthread_mutex_unlock(&pulse->lock);
    return writing;
}

uint64_t csv_pulse_next_sequence(struct csv_pulse *pulse)
{
    pthread_mutex_lock(&pulse->lock);
    uint64_t sequence = ++pulse->sequence;
    pthread_mutex_unlock(&pulse->lock);
    return sequence;
}

int64_t csv_pulse_lease_ns(const struct csv_pulse *pulse)
{
    return atomic_load(&pulse->lease_ns);
}

int csv_pulse_fd(const struct csv_pulse *pulse)
{
    return pulse->news_fd;
}

void csv_pulse_reap(struct csv_pulse *pulse, struct csv_pulse_news *news)
{
    uint64_t count;

    while (read(pulse->news_fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
    pthread_mutex_lock(&pulse->lock);
    *news = pulse->news;
    pulse->news = (struct csv_pulse_news){0};
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_statistics(struct csv_pulse *pulse, struct csv_pulse_statistics *statistics)
{
    pthread_mutex_lock(&pulse->lock);
    *statistics = pulse->statistics;
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_stop(struct csv_pulse *pulse)
{
    pthread_mutex_lock(&pulse->lock);
    pulse->stopped = true;
    pulse->session = NULL;
    atomic_store(&pulse->lease_ns, INT64_MIN);
    pthread_mutex_unlock(&pulse->lock);
}

void csv_pulse_free(struct csv_pulse *pulse)
{
    if (pulse->process == getpid()) {
        pthread_mutex_lock(&pulse->lock);
        pulse->closing = true;
        pthread_cond_signal(&pulse->changed);
        pthread_mutex_unlock(&pulse->lock);
        pthread_join(pulse->thread, NULL);
        pthread_cond_destroy(&pulse->changed);
        pthread_mutex_destroy(&pulse->lock);
    }
    free_all(pulse);
}
