/* Sessions opened, loaded from two threads, and dropped in the middle, for the sanitizers of gcc.
 *
 *   session_stress PORTAL TARGET ROUNDS
 *
 * Two workers at a time, each with a session of its own and a second thread that submits to it. A
 * session ends by logout, abort, close in full flight, or a command timeout. Ends with status 0 when
 * every request came back exactly once.
 */
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "session.h"

enum { WORKERS = 2, REQUESTS = 300, BYTES = 16384, LARGE = 40, LARGE_BYTES = 256 << 10 };

struct job {
    struct csv_request request;
    unsigned char *buffer;
    int returned;
};

struct worker {
    const char *portal, *target;
    int number, rounds;
    struct csv_session *session;
    struct job jobs[2 * REQUESTS];
    struct job login, logout;
};

static atomic_int completed_by_callback;

static void fail(const char *what)
{
    fprintf(stderr, "session_stress: %s\n", what);
    exit(1);
}

static void on_complete(struct csv_request *request)
{
    ((struct job *)request)->returned++;
    atomic_fetch_add(&completed_by_callback, 1);
}

static void prepare(struct job *job, int number)
{
    uint32_t bytes = number % LARGE ? BYTES : LARGE_BYTES;

    memset(&job->request, 0, sizeof job->request);
    job->returned = 0;
    job->request.op = number % 3 == 0 ? CSV_READ : number % 3 == 1 ? CSV_WRITE : CSV_SCSI;
    job->request.cdb_bytes = 6; /* TEST UNIT READY */
    if (job->request.op == CSV_SCSI)
        return;
    job->request.buffer = job->buffer = malloc(bytes);
    memset(job->buffer, number, bytes);
    job->request.length = bytes;
    job->request.lba = (uint64_t)number * (BYTES / 512);
    job->request.fua = number % 7 == 0;
}

static void *submit_half(void *argument)
{
    struct worker *worker = argument;
    for (int number = REQUESTS; number < 2 * REQUESTS; number++)
        csv_session_submit(worker->session, &worker->jobs[number].request);
    return NULL;
}

static int reap(struct worker *worker)
{
    int count = 0;
    struct csv_request *request = csv_session_reap(worker->session);
    while (request) {
        struct csv_request *later = request->next;
        ((struct job *)request)->returned++;
        request = later;
        count++;
    }
    return count;
}

static void wait_for(struct worker *worker, struct job *job)
{
    while (!job->returned) {
        struct pollfd ready = {.fd = csv_session_fd(worker->session), .events = POLLIN};
        if (poll(&ready, 1, 20000) <= 0)
            fail("nothing came back within 20 s");
        reap(worker);
    }
}

static void one_session(struct worker *worker, int round)
{
    struct csv_config config = {
        .portal = worker->portal,
        .target = worker->target,
        .initiator = "iqn.2026-11.test.csvfs:stress",
        .user = "",
        .password = "",
        .isid = 0x800000000000 + (uint64_t)worker->number,
        .lun = 1,
        .login_timeout_ms = 20000,
        .command_timeout_ms = round % 5 == 4 ? 5 : 20000,
        .ping_interval_ms = 10,
        .ping_timeout_ms = 20000,
        .max_in_flight = round % 2 ? CSV_MAX_IN_FLIGHT : 24,
    };
    pthread_t other;
    struct csv_statistics statistics;

    memset(&worker->login, 0, sizeof worker->login);
    memset(&worker->logout, 0, sizeof worker->logout);
    worker->session = csv_session_open(&config, &worker->login.request);
    if (!worker->session)
        fail("no session");
    wait_for(worker, &worker->login);
    if (worker->login.request.outcome != CSV_DONE)
        fail(csv_session_text(worker->session));
    csv_session_set_geometry(worker->session, 512, 65536);
    for (int number = 0; number < 2 * REQUESTS; number++) {
        prepare(&worker->jobs[number], number);
        if (number % 11 == 0)
            worker->jobs[number].request.complete = on_complete;
    }
    pthread_create(&other, NULL, submit_half, worker);
    for (int number = 0; number < REQUESTS; number++) {
        csv_session_submit(worker->session, &worker->jobs[number].request);
        if (number % 50 == 0)
            reap(worker);
    }
    csv_session_statistics(worker->session, &statistics);
    pthread_join(other, NULL);
    if (round % 5 == 0) {
        worker->logout.request.op = CSV_LOGOUT;
        csv_session_submit(worker->session, &worker->logout.request);
        wait_for(worker, &worker->logout);
    } else if (round % 5 == 1) {
        csv_session_abort(worker->session);
    }
    csv_session_close(worker->session);
    reap(worker);
    csv_session_free(worker->session);
    for (int number = 0; number < 2 * REQUESTS; number++) {
        struct job *job = &worker->jobs[number];
        if (job->returned != 1)
            fail("a request did not come back exactly once");
        if (round % 5 == 0 && job->request.outcome == CSV_UNKNOWN)
            fail("an outcome is unknown though nothing went wrong");
        free(job->buffer);
        job->buffer = NULL;
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    for (int round = 0; round < worker->rounds; round++)
        one_session(worker, round + worker->number);
    return NULL;
}

int main(int count, char **arguments)
{
    static struct worker workers[WORKERS];
    pthread_t threads[WORKERS];

    if (count != 4)
        fail("usage: session_stress PORTAL TARGET ROUNDS");
    for (int number = 0; number < WORKERS; number++) {
        workers[number].portal = arguments[1];
        workers[number].target = arguments[2];
        workers[number].rounds = atoi(arguments[3]);
        workers[number].number = number;
        pthread_create(&threads[number], NULL, work, &workers[number]);
    }
    for (int number = 0; number < WORKERS; number++)
        pthread_join(threads[number], NULL);
    printf("%d callbacks\n", atomic_load(&completed_by_callback));
    return 0;
}
