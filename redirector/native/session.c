/* The thread of a session: what it waits for, when it gives up, and how requests come and go.
 *
 * Invariants
 *   - only the thread touches the libiscsi context; callbacks never destroy it, they call csv_lose
 *   - a request is in exactly one place: submitted, pending, on the wire (outstanding > 0), completed
 *   - a request whose outcome is unknown comes back only when the context is gone
 *   - in_flight <= window <= config.max_in_flight <= CSV_MAX_IN_FLIGHT
 *   - after `lost` nothing is on the wire, and what is submitted comes back as CSV_UNKNOWN
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

enum {
    STACK_BYTES = 256 << 10,
    SLEEP_LIMIT_MS = 1000, /* a longer gap means that this host slept, not the target */
};

static uint64_t monotonic_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void wake(int fd)
{
    uint64_t one = 1;
    while (write(fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void drain(int fd)
{
    uint64_t count;
    while (read(fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

/* -- on the session's thread ------------------------------------------------------------------ */

void csv_lose(struct csv_session *session, const char *format, ...)
{
    if (session->losing || session->destroying || session->phase == CSV_DOWN)
        return;
    session->losing = true;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(session->text, sizeof session->text, format, arguments);
    va_end(arguments);
}

/* With libiscsi's reason, unless that is left over from a command that was answered. */
void csv_lose_context(struct csv_session *session)
{
    const char *text = session->context ? iscsi_get_error(session->context) : "";

    if (!text[0] || !strcmp(text, session->answered_text))
        text = "the connection was closed";
    csv_lose(session, "%s", text);
}

/* The request leaves the session. */
void csv_finish(struct csv_session *session, struct csv_request *request)
{
    if (request->complete)
        request->complete(request);
    else if (csv_queue_push(&session->completed, request))
        wake(session->complete_fd);
}

static void go_down(struct csv_session *session)
{
    atomic_store(&session->lost, true); /* before the first request ends as unknown */
    csv_context_destroy(session);
    session->phase = CSV_DOWN;
    csv_fail_everything(session);
    if (session->login) {
        struct csv_request *login = session->login;
        session->login = NULL;
        login->outcome = CSV_UNKNOWN;
        csv_finish(session, login);
    }
    wake(session->complete_fd);
}

static void take_submissions(struct csv_session *session)
{
    struct csv_request *request = csv_queue_take(&session->submitted);
    while (request) {
        struct csv_request *later = request->next;
        csv_enqueue(session, request);
        request = later;
    }
    if (session->phase == CSV_DOWN)
        csv_fail_everything(session);
}

static int poll_timeout_ms(const struct csv_session *session)
{
    uint64_t wake_ms = csv_next_deadline_ms(session);

    if (session->phase == CSV_CONNECTING)
        wake_ms = session->login_deadline_ms;
    if (session->phase == CSV_UP && session->config.ping_interval_ms) {
        uint64_t look_ms = csv_next_look_ms(session);
        if (look_ms < wake_ms)
            wake_ms = look_ms;
    }
    if (wake_ms == UINT64_MAX)
        return -1;
    if (wake_ms <= session->now_ms)
        return 0;
    return wake_ms - session->now_ms > 60000 ? 60000 : (int)(wake_ms - session->now_ms);
}

/* Wait for the target, for a submission, or for the next deadline. */
static void wait_and_serve(struct csv_session *session)
{
    struct pollfd fds[2] = {{.fd = session->submit_fd, .events = POLLIN}};
    nfds_t count = 1;

    if (session->context) {
        fds[1].fd = iscsi_get_fd(session->context);
        fds[1].events = (short)iscsi_which_events(session->context);
        count = 2;
    }
    /* A submitter looks at `sleeping` after its push, this thread at the queue after `sleeping`:
     * one of them sees the other. */
    atomic_store(&session->sleeping, true);
    int timeout_ms = csv_queue_empty(&session->submitted) ? poll_timeout_ms(session) : 0;
    int ready = poll(fds, count, timeout_ms);
    atomic_store(&session->sleeping, false);

    uint64_t before_ms = session->now_ms;
    session->now_ms = monotonic_ms();
    uint64_t due_ms = before_ms + (uint64_t)(timeout_ms < 0 ? 0 : timeout_ms);
    if (timeout_ms >= 0 && session->now_ms > due_ms + SLEEP_LIMIT_MS)
        csv_forgive(session, session->now_ms - due_ms);
    if (ready <= 0)
        return;
    if (fds[0].revents)
        drain(session->submit_fd);
    if (count == 2 && fds[1].revents) {
        short events = fds[1].revents;
        if (events & POLLOUT)
            session->sent_ms = session->now_ms;
        if (events & POLLIN) {
            session->heard_ms = session->now_ms;
            events &= POLLIN | POLLOUT; /* read what is there before looking at a hang-up */
        }
        if (iscsi_service(session->context, events) < 0)
            csv_lose_context(session);
        else if (session->phase == CSV_UP && !iscsi_is_logged_in(session->context))
            csv_lose(session, "the target asked for a logout");
    }
}

static void check_timers(struct csv_session *session)
{
    const struct csv_config *config = &session->config;

    if (session->phase == CSV_CONNECTING && session->now_ms >= session->login_deadline_ms)
        csv_lose(session, "no answer within %u ms", config->login_timeout_ms);
    if (session->phase != CSV_UP)
        return;
    csv_check_deadlines(session);
    if (config->ping_interval_ms)
        csv_check_silence(session);
}

static void *run(void *argument)
{
    struct csv_session *session = argument;

    session->now_ms = session->heard_ms = monotonic_ms();
    session->login_deadline_ms = session->now_ms + session->config.login_timeout_ms;
    csv_login_start(session);
    while (!atomic_load(&session->close_wanted)) {
        if (atomic_load(&session->abort_wanted))
            csv_lose(session, "the session was dropped");
        if (session->redirected && !session->losing)
            csv_login_redirect(session);
        if (session->losing && session->phase != CSV_DOWN)
            go_down(session);
        take_submissions(session);
        if (session->phase == CSV_UP)
            csv_issue(session);
        if (session->losing && session->phase != CSV_DOWN)
            continue;
        wait_and_serve(session);
        csv_settle(session);
        check_timers(session);
    }
    csv_lose(session, "the session was closed");
    if (session->phase != CSV_DOWN)
        go_down(session);
    take_submissions(session);
    return NULL;
}

/* -- on any thread ---------------------------------------------------------------------------- */

static bool copy_text(char *to, const char *from)
{
    size_t length = strlen(from);
    if (length >= CSV_TEXT_BYTES - 1)
        return false;
    memcpy(to, from, length + 1);
    return true;
}

static int start_thread(struct csv_session *session)
{
    pthread_attr_t attributes;
    sigset_t all, before;

    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* Signals are for the owner's threads; and libiscsi's writev could raise SIGPIPE here. */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&session->thread, &attributes, run, session);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (!error)
        pthread_setname_np(session->thread, "csvfs-iscsi");
    return error;
}

struct csv_session *csv_session_open(const struct csv_config *config, struct csv_request *login)
{
    struct csv_session *session = calloc(1, sizeof *session);
    int error = ENOMEM;

    if (!session)
        goto failed;
    session->submit_fd = session->complete_fd = -1;
    session->config = *config;
    error = EINVAL;
    if (!copy_text(session->portal, config->portal) || !copy_text(session->target, config->target) ||
        !copy_text(session->initiator, config->initiator) ||
        !copy_text(session->user, config->user) || !copy_text(session->password, config->password) ||
        !csv_isid_valid(config->isid) || config->lun > 0x3fff || !config->max_in_flight ||
        config->max_in_flight > CSV_MAX_IN_FLIGHT)
        goto failed;
    session->config.portal = session->portal;
    session->config.target = session->target;
    session->config.initiator = session->initiator;
    session->config.user = session->user;
    session->config.password = session->password;
    if (config->lun > 255) /* flat space addressing (SAM-5 4.7.7.3); below, peripheral */
        session->config.lun = config->lun | 0x4000;
    session->login = login;
    session->window = config->max_in_flight;
    session->patience_ms = config->patience_ms > config->ping_timeout_ms ? config->patience_ms
                                                                         : config->ping_timeout_ms;
    session->ended_tag = 0xffffffff; /* of no command */
    session->proven = 1;
    session->widen_every_ms = CSV_WIDEN_LEAST_MS;
    session->earliest_deadline_ms = UINT64_MAX;
    session->process = getpid();
    if (getrandom(&session->no_data, sizeof session->no_data, 0) != sizeof session->no_data) {
        error = errno;
        goto failed;
    }
    for (int i = CSV_MAX_IN_FLIGHT - 1; i >= 0; i--) {
        session->pieces[i].session = session;
        session->pieces[i].next = session->free_pieces;
        session->free_pieces = &session->pieces[i];
    }
    session->submit_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    session->complete_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (session->submit_fd < 0 || session->complete_fd < 0) {
        error = errno;
        goto failed;
    }
    error = start_thread(session);
    if (error)
        goto failed;
    return session;

failed:
    if (session) {
        session->joined = true;
        csv_session_free(session);
    }
    errno = error;
    return NULL;
}

void csv_session_set_geometry(struct csv_session *session, uint32_t block_bytes,
                              uint32_t max_transfer_bytes)
{
    session->block_bytes = block_bytes;
    session->max_transfer_bytes = max_transfer_bytes - max_transfer_bytes % block_bytes;
}

void csv_session_submit(struct csv_session *session, struct csv_request *request)
{
    csv_queue_push(&session->submitted, request);
    if (atomic_exchange(&session->sleeping, false))
        wake(session->submit_fd);
}

int csv_session_fd(const struct csv_session *session)
{
    return session->complete_fd;
}

struct csv_request *csv_session_reap(struct csv_session *session)
{
    drain(session->complete_fd);
    return csv_queue_take(&session->completed);
}

void csv_session_abort(struct csv_session *session)
{
    atomic_store(&session->abort_wanted, true);
    wake(session->submit_fd);
}

bool csv_session_lost(const struct csv_session *session)
{
    return atomic_load(&session->lost);
}

const char *csv_session_text(const struct csv_session *session)
{
    return csv_session_lost(session) ? session->text : "";
}

const char *csv_session_portal(const struct csv_session *session)
{
    return session->portal;
}

uint32_t csv_session_silent_ms(const struct csv_session *session)
{
    return csv_session_lost(session) ? session->silent_ms : 0;
}

void csv_session_statistics(struct csv_session *session, struct csv_statistics *statistics)
{
    statistics->commands = atomic_load(&session->commands);
    statistics->pings = atomic_load(&session->pings);
    statistics->in_flight = (uint32_t)atomic_load(&session->shown_in_flight);
    statistics->peak_in_flight = (uint32_t)atomic_load(&session->peak_in_flight);
    statistics->window = (uint32_t)atomic_load(&session->shown_window);
    statistics->patience_ms = (uint32_t)atomic_load(&session->patience_ms);
}

static void close_descriptors(struct csv_session *session)
{
    if (session->submit_fd >= 0)
        close(session->submit_fd);
    if (session->complete_fd >= 0)
        close(session->complete_fd);
    session->submit_fd = session->complete_fd = -1;
}

void csv_session_close(struct csv_session *session)
{
    if (session->joined)
        return;
    if (session->process != getpid()) { /* a read here would swallow a wake-up of the parent */
        close_descriptors(session);
        session->joined = true;
        return;
    }
    atomic_store(&session->close_wanted, true);
    wake(session->submit_fd);
    pthread_join(session->thread, NULL);
    session->joined = true;
}

void csv_session_free(struct csv_session *session)
{
    csv_session_close(session);
    close_descriptors(session);
    explicit_bzero(session->password, sizeof session->password);
    free(session);
}
