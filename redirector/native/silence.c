/* When a target has been silent for too long: pings, what moves, and how patient to be.
 *
 * A ping is a NOP-Out. libiscsi's takes a CmdSN, so behind a command for which the target's window is
 * closed it does not leave. The probe then takes its place, an immediate PDU: ABORT TASK of the command
 * that was answered last. The target says "no such task", and that it says anything is all we ask.
 *
 * While a ping awaits its answer, the session is lost when nothing has come for `patience_ms`; but that
 * starts again when bytes were seen to leave: a line that is slow is no silence.
 */
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>

#include "internal.h"

static bool awaits_ping(const struct csv_session *session)
{
    return session->nop_out || session->probe_out;
}

static uint64_t patience_ms(const struct csv_session *session)
{
    return atomic_load_explicit(&session->patience_ms, memory_order_relaxed);
}

static uint64_t silent_since_ms(const struct csv_session *session)
{
    return session->heard_ms > session->ping_sent_ms ? session->heard_ms : session->ping_sent_ms;
}

/* libiscsi holds back what the target has no place for. */
static bool window_closed(struct csv_session *session)
{
    return csv_unsent(session) && !(iscsi_which_events(session->context) & POLLOUT);
}

static void send_probe(struct csv_session *session)
{
    if (iscsi_task_mgmt_async(session->context, (int)session->config.lun, ISCSI_TM_ABORT_TASK,
                              session->ended_tag, session->ended_number, csv_on_probe, session) ||
        iscsi_service(session->context, POLLOUT) < 0) {
        csv_lose_context(session);
        return;
    }
    session->probe_out = true;
}

static void send_ping(struct csv_session *session)
{
    session->ping_sent_ms = session->now_ms;
    session->watch_at_ms = session->now_ms + session->config.ping_timeout_ms / 4;
    session->queued_bytes = 0;
    if (window_closed(session))
        send_probe(session);
    else if (iscsi_nop_out_async(session->context, csv_on_nop, NULL, 0, session))
        csv_lose_context(session);
    else
        session->nop_out = true;
}

/* A ping waits its turn behind data that goes out slowly: its time counts from when nothing was seen to
 * move before it. One that waits for the target's window is followed by a probe. */
static void watch(struct csv_session *session)
{
    int queued = 0; /* in the kernel, not yet acknowledged */
    bool closed = window_closed(session);
    bool sent = csv_unsent(session) && !closed && session->sent_ms > session->ping_sent_ms;

    ioctl(iscsi_get_fd(session->context), SIOCOUTQ, &queued);
    if (queued < session->queued_bytes || sent)
        session->ping_sent_ms = session->now_ms;
    session->queued_bytes = queued;
    session->watch_at_ms = session->now_ms + session->config.ping_timeout_ms / 4;
    if (closed && !session->probe_out &&
        session->now_ms >= session->heard_ms + session->config.ping_interval_ms) {
        session->ping_sent_ms = session->now_ms;
        send_probe(session);
    }
}

/* After a loss that was none, the next session is more patient, until the target proves quick. */
static void calm_down(struct csv_session *session, uint64_t silent_ms)
{
    const struct csv_config *config = &session->config;

    if (silent_ms >= config->ping_timeout_ms / 2)
        session->restless_ms = session->now_ms;
    else if (session->now_ms >= session->restless_ms + config->calm_ms)
        atomic_store_explicit(&session->patience_ms, config->ping_timeout_ms, memory_order_relaxed);
}

/* When csv_check_silence has something to do, if nothing is heard until then. */
uint64_t csv_next_look_ms(const struct csv_session *session)
{
    if (!awaits_ping(session))
        return session->heard_ms + session->config.ping_interval_ms;
    uint64_t ends_ms = silent_since_ms(session) + patience_ms(session);
    return ends_ms < session->watch_at_ms ? ends_ms : session->watch_at_ms;
}

void csv_check_silence(struct csv_session *session)
{
    if (!awaits_ping(session)) {
        calm_down(session, 0);
        if (session->now_ms >= session->heard_ms + session->config.ping_interval_ms)
            send_ping(session);
        return;
    }
    if (session->now_ms >= session->watch_at_ms)
        watch(session);
    uint64_t silent_ms = session->now_ms - silent_since_ms(session);
    calm_down(session, silent_ms);
    if (silent_ms < patience_ms(session) || session->losing)
        return;
    session->silent_ms = (uint32_t)patience_ms(session);
    csv_lose(session, "the target has been silent for %llu ms",
             (unsigned long long)(session->now_ms - session->heard_ms));
}
