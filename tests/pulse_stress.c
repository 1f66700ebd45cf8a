/* Pulses on sessions that come and go in the middle, told new things by several threads, for the
 * sanitizers of gcc.
 *
 *   pulse_stress PORTAL TARGET ROUNDS
 *
 * Two workers at a time, each with a pulse and one session after the other; a second thread shows,
 * addresses, stamps and reaps. A session ends by logout, abort or close while it is written on; every
 * third pulse is stopped first. Ends with status 0 when writes were confirmed and nothing is left.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pulse.h"

enum { WORKERS = 2 };

struct worker {
    const char *portal, *target;
    int number, rounds;
    int peer;
    struct sockaddr_in address;
    struct csv_pulse *pulse;
    atomic_bool over; /* the round */
    uint64_t written, failed;
};

static atomic_int datagrams;

static void fail(const char *what)
{
    fprintf(stderr, "pulse_stress: %s\n", what);
    exit(1);
}

static int open_peer(struct sockaddr_in *address)
{
    socklen_t length = sizeof *address;
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

    memset(address, 0, sizeof *address);
    address->sin_family = AF_INET;
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)address, sizeof *address) ||
        getsockname(fd, (struct sockaddr *)address, &length))
        fail("no socket");
    return fd;
}

static void address(struct worker *worker, int secret)
{
    uint8_t bytes[CSV_SECRET_BYTES];
    struct csv_target *targets = calloc(3, sizeof *targets);

    memset(bytes, secret, sizeof bytes);
    for (int i = 0; i < 3; i++) {
        memcpy(&targets[i].address, &worker->address, sizeof worker->address);
        targets[i].length = sizeof worker->address;
    }
    csv_pulse_address(worker->pulse, bytes, targets, 3);
}

static void show(struct worker *worker, int epoch)
{
    uint8_t block[CSV_BLOCK_BYTES] = {0};
    struct csv_life life = {.slot = (uint8_t)worker->number, .epoch = (uint64_t)epoch};

    csv_pulse_show(worker->pulse, &life, block, epoch % 2);
}

static void reap(struct worker *worker)
{
    struct csv_pulse_news news;

    csv_pulse_reap(worker->pulse, &news);
    worker->written += news.written;
    worker->failed += news.failed;
}

static void *tell(void *argument)
{
    struct worker *worker = argument;
    struct csv_pulse_statistics statistics;
    char data[100];

    for (int i = 0; !atomic_load(&worker->over); i++) {
        csv_pulse_stamp(worker->pulse);
        show(worker, i);
        if (i % 5 == 0)
            address(worker, i);
        if (i % 3 == 0)
            reap(worker);
        csv_pulse_statistics(worker->pulse, &statistics);
        csv_pulse_lease_ns(worker->pulse);
        csv_pulse_next_sequence(worker->pulse);
        while (recv(worker->peer, data, sizeof data, 0) == CSV_DATAGRAM_BYTES)
            atomic_fetch_add(&datagrams, 1);
        usleep(i % 10 == 9 ? 8000 : 1000); /* longer than it takes to be believed dead */
    }
    return NULL;
}

static void wait_for(struct csv_session *session)
{
    struct pollfd ready = {.fd = csv_session_fd(session), .events = POLLIN};

    if (poll(&ready, 1, 20000) <= 0)
        fail("nothing came back within 20 s");
}

static struct csv_session *log_in(struct worker *worker, struct csv_request *login)
{
    struct csv_config config = {
        .portal = worker->portal,
        .target = worker->target,
        .initiator = "iqn.2026-11.test.csvfs:pulse",
        .user = "",
        .password = "",
        .isid = 0x800000000000 + (uint64_t)worker->number,
        .lun = 1,
        .login_timeout_ms = 20000,
        .command_timeout_ms = 20000,
        .max_in_flight = 24,
    };

    memset(login, 0, sizeof *login);
    struct csv_session *session = csv_session_open(&config, login);
    if (!session)
        fail("no session");
    wait_for(session);
    if (csv_session_reap(session) != login || login->outcome != CSV_DONE)
        fail(csv_session_text(session));
    csv_session_set_geometry(session, 512, 65536);
    for (int i = 0; i < 2; i++) { /* the first one fetches the unit attention of the login */
        *login = (struct csv_request){.op = CSV_SCSI, .cdb_bytes = 6}; /* TEST UNIT READY */
        csv_session_submit(session, login);
        wait_for(session);
        csv_session_reap(session);
    }
    return session;
}

static void one_session(struct worker *worker, int round)
{
    struct csv_request login, logout = {.op = CSV_LOGOUT};
    struct csv_session *session = log_in(worker, &login);
    uint64_t lba = (uint64_t)(worker->number * 64 + 8);

    csv_pulse_attach(worker->pulse, session, (uint64_t)round, lba);
    usleep(20000);
    if (round % 4 == 0) {
        csv_pulse_detach(worker->pulse, NULL);
        csv_session_submit(session, &logout);
        wait_for(session);
    } else if (round % 4 == 1) {
        csv_session_abort(session);
        usleep(2000);
    } else if (round % 4 == 2) {
        csv_pulse_attach(worker->pulse, session, (uint64_t)round + 1000, lba);
    }
    csv_pulse_detach(worker->pulse, session);
    csv_session_close(session);
    csv_session_reap(session);
    csv_session_free(session);
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct csv_pulse_config config = {.interval_ms = 2, .alive_ms = 5, .lease_ms = 50};
    int own = open_peer(&worker->address);

    worker->peer = open_peer(&worker->address);
    config.socket = own;
    for (int round = 0; round < worker->rounds; round++) {
        pthread_t other;
        worker->pulse = csv_pulse_open(&config);
        if (!worker->pulse)
            fail("no pulse");
        address(worker, 0);
        atomic_store(&worker->over, false);
        pthread_create(&other, NULL, tell, worker);
        for (int i = 0; i < 4; i++)
            one_session(worker, i);
        if (round % 3 == 0) {
            csv_pulse_stop(worker->pulse);
            one_session(worker, 3);
            if (csv_pulse_lease_ns(worker->pulse) != INT64_MIN)
                fail("a lease after the end");
        }
        atomic_store(&worker->over, true);
        pthread_join(other, NULL);
        reap(worker);
        if (csv_pulse_writing(worker->pulse))
            fail("a write is left");
        csv_pulse_free(worker->pulse);
    }
    close(own);
    close(worker->peer);
    return NULL;
}

int main(int count, char **arguments)
{
    static struct worker workers[WORKERS];
    pthread_t threads[WORKERS];
    uint64_t written = 0;

    if (count != 4)
        fail("usage: pulse_stress PORTAL TARGET ROUNDS");
    for (int number = 0; number < WORKERS; number++) {
        workers[number].portal = arguments[1];
        workers[number].target = arguments[2];
        workers[number].rounds = atoi(arguments[3]);
        workers[number].number = number;
        pthread_create(&threads[number], NULL, work, &workers[number]);
    }
    for (int number = 0; number < WORKERS; number++) {
        pthread_join(threads[number], NULL);
        written += workers[number].written;
    }
    if (!written || !atomic_load(&datagrams))
        fail("nothing was written, or nothing came");
    printf("%llu written, %d datagrams\n", (unsigned long long)written, atomic_load(&datagrams));
    return 0;
}
