/* What became of the commands on the wire: answers, refusals, and what nobody will answer any more. */
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

void csv_show_in_flight(struct csv_session *session)
{
    atomic_store_explicit(&session->shown_in_flight, session->in_flight, memory_order_relaxed);
    atomic_store_explicit(&session->shown_window, session->window, memory_order_relaxed);
    if (session->in_flight > atomic_load_explicit(&session->peak_in_flight, memory_order_relaxed))
        atomic_store_explicit(&session->peak_in_flight, session->in_flight, memory_order_relaxed);
}

static void release_piece(struct csv_session *session, struct csv_piece *piece)
{
    if (piece->previous)
        piece->previous->next = piece->next;
    else {
        session->oldest = piece->next;
        session->oldest_since_ms = session->now_ms;
    }
    if (piece->next)
        piece->next->previous = piece->previous;
    else
        session->newest = piece->previous;
    session->answered -= piece->answered;
    piece->answered = false;
    piece->data = (struct scsi_iovec){0};
    piece->request = NULL;
    piece->next = session->free_pieces;
    session->free_pieces = piece;
    session->in_flight--;
    csv_show_in_flight(session);
}

/* One piece has ended, with what the request's fields now say; the request may have others. */
static void end_piece(struct csv_piece *piece)
{
    struct csv_session *session = piece->session;
    struct csv_request *request = piece->request;

    release_piece(session, piece);
    if (--request->outstanding)
        return;
    if (request == session->pending) {
        if (request->outcome == CSV_DONE)
            return; /* the rest of it is still to be issued */
        csv_drop_pending_head(session);
    }
    csv_finish(session, request);
}

/* libiscsi still has something to send. */
bool csv_unsent(struct csv_session *session)
{
    return iscsi_which_events(session->context) & POLLOUT ||
           iscsi_out_queue_length(session->context) > 0;
}

/* A write that was refused while its data was still being sent ends when the last of it has left:
 * libiscsi 1.19 keeps Data-Out PDUs that point into the task and the caller's buffer. */
void csv_settle(struct csv_session *session)
{
    if (!session->answered || session->losing || csv_unsent(session))
        return;
    for (struct csv_piece *piece = session->oldest, *later; piece; piece = later) {
        later = piece->next;
        if (piece->answered)
            end_piece(piece);
    }
}

/* GOOD, but was everything transferred? False if that cannot be told. */
static bool take_good(struct csv_piece *piece)
{
    struct csv_session *session = piece->session;
    struct csv_request *request = piece->request;
    const struct scsi_task *task = piece->task;
    size_t length = piece->data.iov_len;
    bool blocks = request->op == CSV_READ || request->op == CSV_WRITE;

    if (task->residual_status == SCSI_RESIDUAL_UNDERFLOW)
        request->residual += (uint32_t)(task->residual < length ? task->residual : length);
    else if (task->residual_status == SCSI_RESIDUAL_OVERFLOW && blocks)
        return false; /* its blocks are not as long as ours */
    else if (request->op == CSV_READ)
        return memcmp(csv_last_bytes(piece), &session->no_data, sizeof session->no_data) != 0;
    return true;
}

static void take_refusal(struct csv_request *request, int status, const struct scsi_task *task)
{
    if (request->outcome != CSV_DONE)
        return; /* another piece was refused before: that answer stands */
    request->outcome = CSV_REFUSED;
    request->status = status;
    if (status != SCSI_STATUS_CHECK_CONDITION || !task->datain.data || task->datain.size < 2)
        return;
    const uint8_t *sense = task->datain.data; /* two bytes of length, then the sense data */
    size_t bytes = (size_t)sense[0] << 8 | sense[1];
    if (bytes > (size_t)task->datain.size - 2)
        bytes = (size_t)task->datain.size - 2;
    if (bytes > CSV_SENSE_BYTES)
        bytes = CSV_SENSE_BYTES;
    memcpy(request->sense, sense + 2, bytes);
    request->sense_bytes = (uint8_t)bytes;
}

void csv_on_scsi(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_piece *piece = private;
    struct csv_session *session = piece->session;
    struct csv_request *request = piece->request;
    (void)data;

    switch (status) {
    case SCSI_STATUS_GOOD:
    case SCSI_STATUS_CONDITION_MET:
        if (take_good(piece))
            break;
        csv_lose(session, "the target sent GOOD, but not the data");
        return;
    case SCSI_STATUS_CHECK_CONDITION:
    case SCSI_STATUS_BUSY:
    case SCSI_STATUS_RESERVATION_CONFLICT:
    case SCSI_STATUS_TASK_SET_FULL:
    case SCSI_STATUS_ACA_ACTIVE:
    case SCSI_STATUS_TASK_ABORTED:
        take_refusal(request, status, piece->task);
        snprintf(session->answered_text, sizeof session->answered_text, "%s",
                 iscsi_get_error(context));
        break;
    default: /* cancelled, rejected, garbled; csv_fail_everything ends it */
        csv_lose_context(session);
        return;
    }
    session->ended_tag = piece->task->itt;
    session->ended_number = piece->task->cmdsn;
    atomic_fetch_add_explicit(&session->commands, 1, memory_order_relaxed);
    if (request->outcome == CSV_REFUSED && piece->task->xfer_dir == SCSI_XFER_WRITE &&
        csv_unsent(session)) {
        piece->answered = true;
        session->answered++;
        return;
    }
    end_piece(piece);
}

void csv_on_task_management(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_piece *piece = private;
    (void)context;

    if (status != SCSI_STATUS_GOOD || !data) {
        csv_lose_context(piece->session);
        return;
    }
    piece->request->status = (int)(*(uint32_t *)data & 0xff);
    piece->request->outcome = piece->request->status ? CSV_REFUSED : CSV_DONE;
    end_piece(piece);
}

void csv_on_logout(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_piece *piece = private;
    struct csv_session *session = piece->session;
    (void)context;
    (void)data;

    if (status != SCSI_STATUS_GOOD) {
        csv_lose_context(session);
        return;
    }
    session->logged_out = true;
    end_piece(piece);
    csv_lose(session, "logged out");
}

void csv_on_nop(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_session *session = private;
    (void)context;
    (void)data;

    session->nop_out = false;
    if (status == SCSI_STATUS_GOOD)
        atomic_fetch_add_explicit(&session->pings, 1, memory_order_relaxed);
    else
        csv_lose_context(session);
}

/* Whatever the target says to the probe, it has spoken; only a connection that ends is no answer. */
void csv_on_probe(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_session *session = private;
    (void)context;
    (void)data;

    session->probe_out = false;
    if (status != SCSI_STATUS_CANCELLED)
        atomic_fetch_add_explicit(&session->pings, 1, memory_order_relaxed);
    else
        csv_lose_context(session);
}

/* -- giving up -------------------------------------------------------------------------------- */

/* A target that is slow answers one command after the other, however many wait before ours: so
 * `command_timeout_ms` counts from when a command is the oldest. */
static uint64_t stuck_at_ms(const struct csv_session *session)
{
    if (!session->oldest || session->oldest->deadline_ms != UINT64_MAX)
        return UINT64_MAX;
    return session->oldest_since_ms + session->config.command_timeout_ms;
}

uint64_t csv_next_deadline_ms(const struct csv_session *session)
{
    uint64_t stuck_ms = stuck_at_ms(session);
    return stuck_ms < session->earliest_deadline_ms ? stuck_ms : session->earliest_deadline_ms;
}

void csv_check_deadlines(struct csv_session *session)
{
    uint64_t earliest_ms = UINT64_MAX;

    if (session->now_ms >= stuck_at_ms(session)) {
        csv_lose(session, "a command had no answer in time");
        return;
    }
    if (session->now_ms < session->earliest_deadline_ms)
        return;
    for (struct csv_piece *piece = session->oldest; piece; piece = piece->next) {
        if (piece->deadline_ms <= session->now_ms) {
            csv_lose(session, "a command had no answer in time");
            return;
        }
        if (piece->deadline_ms < earliest_ms)
            earliest_ms = piece->deadline_ms;
    }
    session->earliest_deadline_ms = earliest_ms;
}

/* This host did not run for so long: the target shall not be blamed for it. */
void csv_forgive(struct csv_session *session, uint64_t slept_ms)
{
    for (struct csv_piece *piece = session->oldest; piece; piece = piece->next) {
        if (piece->deadline_ms != UINT64_MAX)
            piece->deadline_ms += slept_ms;
    }
    session->oldest_since_ms += slept_ms;
    session->login_deadline_ms += slept_ms;
    session->heard_ms = session->now_ms;
}

/* Without a context: whatever there is ends as unknown. */
void csv_fail_everything(struct csv_session *session)
{
    while (session->oldest) { /* libiscsi let go of it, most likely without a callback */
        if (!session->oldest->answered)
            session->oldest->request->outcome = CSV_UNKNOWN;
        end_piece(session->oldest);
    }
    while (session->pending) {
        struct csv_request *request = session->pending;
        csv_drop_pending_head(session);
        request->outcome = CSV_UNKNOWN;
        csv_finish(session, request);
    }
    session->earliest_deadline_ms = UINT64_MAX;
}
