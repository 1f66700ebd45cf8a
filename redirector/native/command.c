/* Commands: from a pending request to pieces on the wire, and back to its outcome.
 *
 * The window. A command beyond the target's MaxCmdSN would wait inside libiscsi, where it blocks the
 * pings behind it. libiscsi does not show MaxCmdSN, only that its queue does not move though the
 * socket would take more. So a number of commands in flight that was never tried is approached one
 * by one; when the window closes, the session stays two below it (one place for a ping), and dares a
 * little more every second.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "internal.h"

enum {
    PING_RESERVE = 2,
    WIDEN_EVERY_MS = 1000,
    READ_16 = 0x88,
    WRITE_16 = 0x8a,
    FUA_BIT = 0x08,
};

void csv_enqueue(struct csv_session *session, struct csv_request *request)
{
    request->next = NULL;
    request->outcome = CSV_DONE;
    request->status = 0;
    request->residual = 0;
    request->sense_bytes = 0;
    request->issued = 0;
    request->outstanding = 0;
    if (session->pending)
        session->pending_last->next = request;
    else
        session->pending = request;
    session->pending_last = request;
}

static void drop_pending_head(struct csv_session *session)
{
    session->pending = session->pending->next;
    if (!session->pending)
        session->pending_last = NULL;
}

/* -- answers ---------------------------------------------------------------------------------- */

static void show_in_flight(struct csv_session *session)
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
    else
        session->oldest = piece->next;
    if (piece->next)
        piece->next->previous = piece->previous;
    else
        session->newest = piece->previous;
    if (piece->task)
        scsi_free_scsi_task(piece->task);
    session->answered -= piece->answered;
    piece->answered = false;
    piece->task = NULL;
    piece->request = NULL;
    piece->next = session->free_pieces;
    session->free_pieces = piece;
    session->in_flight--;
    show_in_flight(session);
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
        drop_pending_head(session);
    }
    csv_finish(session, request);
}

/* libiscsi still has something to send. */
static bool unsent(struct csv_session *session)
{
    return iscsi_which_events(session->context) & POLLOUT ||
           iscsi_out_queue_length(session->context) > 0;
}

/* A write that was refused while its data was still being sent ends when the last of it has left:
 * libiscsi 1.19 keeps Data-Out PDUs that point into the task and the caller's buffer. */
void csv_settle(struct csv_session *session)
{
    if (!session->answered || session->losing || unsent(session))
        return;
    for (struct csv_piece *piece = session->oldest, *later; piece; piece = later) {
        later = piece->next;
        if (piece->answered)
            end_piece(piece);
    }
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

static void on_scsi(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_piece *piece = private;
    struct csv_session *session = piece->session;
    struct csv_request *request = piece->request;
    (void)data;

    switch (status) {
    case SCSI_STATUS_GOOD:
    case SCSI_STATUS_CONDITION_MET:
        if (piece->task->residual_status == SCSI_RESIDUAL_UNDERFLOW)
            request->residual += (uint32_t)piece->task->residual;
        break;
    case SCSI_STATUS_CHECK_CONDITION:
    case SCSI_STATUS_BUSY:
    case SCSI_STATUS_RESERVATION_CONFLICT:
    case SCSI_STATUS_TASK_SET_FULL:
    case SCSI_STATUS_ACA_ACTIVE:
    case SCSI_STATUS_TASK_ABORTED:
        take_refusal(request, status, piece->task);
        break;
    default: /* cancelled, rejected, garbled: the target may or may not have done it */
        request->outcome = CSV_UNKNOWN;
        csv_lose(session, "%s", iscsi_get_error(context));
        break;
    }
    if (request->outcome != CSV_UNKNOWN)
        atomic_fetch_add_explicit(&session->commands, 1, memory_order_relaxed);
    if (request->outcome == CSV_REFUSED && piece->task->xfer_dir == SCSI_XFER_WRITE &&
        unsent(session)) {
        piece->answered = true;
        session->answered++;
        return;
    }
    end_piece(piece);
}

static void on_task_management(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_piece *piece = private;

    if (status == SCSI_STATUS_GOOD && data) {
        piece->request->status = (int)(*(uint32_t *)data & 0xff);
        piece->request->outcome = piece->request->status ? CSV_REFUSED : CSV_DONE;
    } else {
        piece->request->outcome = CSV_UNKNOWN;
        csv_lose(piece->session, "%s", iscsi_get_error(context));
    }
    end_piece(piece);
}

static void on_logout(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_piece *piece = private;
    struct csv_session *session = piece->session;
    (void)context;
    (void)data;

    piece->request->outcome = status == SCSI_STATUS_GOOD ? CSV_DONE : CSV_UNKNOWN;
    end_piece(piece);
    csv_lose(session, "logged out");
}

static void on_ping(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_session *session = private;
    (void)data;

    session->ping_out = false;
    if (status == SCSI_STATUS_GOOD)
        atomic_fetch_add_explicit(&session->pings, 1, memory_order_relaxed);
    else
        csv_lose(session, "%s", iscsi_get_error(context));
}

/* -- issue ------------------------------------------------------------------------------------ */

static struct csv_piece *new_piece(struct csv_session *session, struct csv_request *request)
{
    struct csv_piece *piece = session->free_pieces;
    uint32_t timeout_ms =
        request->timeout_ms ? request->timeout_ms : session->config.command_timeout_ms;

    session->free_pieces = piece->next;
    piece->request = request;
    piece->task = NULL;
    piece->deadline_ms = session->now_ms + timeout_ms;
    if (piece->deadline_ms < session->earliest_deadline_ms)
        session->earliest_deadline_ms = piece->deadline_ms;
    piece->next = NULL;
    piece->previous = session->newest;
    if (session->newest)
        session->newest->next = piece;
    else
        session->oldest = piece;
    session->newest = piece;
    session->in_flight++;
    request->outstanding++;
    show_in_flight(session);
    return piece;
}

static void store_be(uint8_t *to, uint64_t value, int bytes)
{
    while (bytes--) {
        to[bytes] = (uint8_t)value;
        value >>= 8;
    }
}

/* The next part of a READ or WRITE that fits one command. */
static void next_block_command(struct csv_session *session, struct csv_request *request,
                               uint8_t cdb[16], uint32_t *bytes)
{
    uint32_t left = request->length - request->issued;

    *bytes = left < session->max_transfer_bytes ? left : session->max_transfer_bytes;
    memset(cdb, 0, 16);
    cdb[0] = request->op == CSV_READ ? READ_16 : WRITE_16;
    cdb[1] = request->op == CSV_WRITE && request->fua ? FUA_BIT : 0;
    store_be(cdb + 2, request->lba + request->issued / session->block_bytes, 8);
    store_be(cdb + 10, *bytes / session->block_bytes, 4);
}

static bool issue_scsi(struct csv_session *session, struct csv_request *request)
{
    struct csv_piece *piece = new_piece(session, request);
    enum csv_direction direction = request->direction;
    uint8_t cdb[16];
    int cdb_bytes = 16;
    uint32_t bytes = request->length;

    if (request->op == CSV_SCSI) {
        cdb_bytes = request->cdb_bytes;
        memcpy(cdb, request->cdb, sizeof cdb);
    } else {
        direction = request->op == CSV_READ ? CSV_DATA_IN : CSV_DATA_OUT;
        next_block_command(session, request, cdb, &bytes);
    }
    piece->data.iov_base = (char *)request->buffer + request->issued;
    piece->data.iov_len = bytes;
    request->issued += bytes;
    piece->task = scsi_create_task(cdb_bytes, cdb,
                                   direction == CSV_DATA_IN    ? SCSI_XFER_READ
                                   : direction == CSV_DATA_OUT ? SCSI_XFER_WRITE
                                                               : SCSI_XFER_NONE,
                                   (int)bytes);
    if (!piece->task)
        return false;
    if (direction == CSV_DATA_IN)
        scsi_task_set_iov_in(piece->task, &piece->data, 1);
    else if (direction == CSV_DATA_OUT)
        scsi_task_set_iov_out(piece->task, &piece->data, 1);
    return iscsi_scsi_command_async(session->context, (int)session->config.lun, piece->task, on_scsi,
                                    NULL, piece) == 0;
}

static bool issue_one(struct csv_session *session, struct csv_request *request)
{
    if (request->op == CSV_TASK) {
        struct csv_piece *piece = new_piece(session, request);
        return iscsi_task_mgmt_async(session->context, (int)session->config.lun, request->function,
                                     0xffffffff, 0, on_task_management, piece) == 0;
    }
    if (request->op == CSV_LOGOUT) {
        struct csv_piece *piece = new_piece(session, request);
        return iscsi_logout_async(session->context, on_logout, piece) == 0;
    }
    return issue_scsi(session, request);
}

/* Put on the wire what libiscsi has. False while it keeps something back. */
static bool push_out(struct csv_session *session)
{
    if (iscsi_service(session->context, POLLOUT) < 0) {
        csv_lose(session, "%s", iscsi_get_error(session->context));
        return false;
    }
    if (session->losing)
        return false;
    bool wants_socket = iscsi_which_events(session->context) & POLLOUT;
    int queued = iscsi_out_queue_length(session->context);
    if (!wants_socket && queued > 0) {
        uint32_t sent = session->in_flight > (uint32_t)queued ? session->in_flight - queued : 0;
        session->window = sent > PING_RESERVE ? sent - PING_RESERVE : 1;
        session->proven = session->window < session->proven ? session->window : session->proven;
        session->widen_at_ms = session->now_ms + WIDEN_EVERY_MS;
    }
    return !wants_socket && queued == 0;
}

static void widen_window(struct csv_session *session)
{
    if (session->window >= session->config.max_in_flight || session->now_ms < session->widen_at_ms)
        return;
    session->window++;
    session->widen_at_ms = session->now_ms + WIDEN_EVERY_MS;
}

/* Several small PDUs, or a command and its data, are one segment and one wake-up of the target. */
static void cork(struct csv_session *session, int on)
{
    setsockopt(iscsi_get_fd(session->context), IPPROTO_TCP, TCP_CORK, &on, sizeof on);
}

static void issue_pending(struct csv_session *session)
{
    bool waiting = false;

    while (session->pending && session->in_flight < session->window && !session->losing) {
        struct csv_request *request = session->pending;
        if (request->op == CSV_LOGOUT && session->in_flight)
            break;
        if (request->outcome != CSV_DONE) { /* a part was refused: the rest is not sent */
            request->issued = request->length;
            drop_pending_head(session);
            continue;
        }
        bool sent = issue_one(session, request);
        if (request->issued == request->length)
            drop_pending_head(session);
        if (!sent) {
            csv_lose(session, "%s", iscsi_get_error(session->context));
            return;
        }
        waiting = true;
        if (session->in_flight <= session->proven)
            continue;
        waiting = false;
        if (!push_out(session))
            return;
        session->proven = session->in_flight;
    }
    if (waiting)
        push_out(session);
}

void csv_issue(struct csv_session *session)
{
    if (!session->pending || session->answered || session->in_flight >= session->window ||
        iscsi_which_events(session->context) & POLLOUT)
        return;
    widen_window(session);
    bool corked = session->pending->next || session->pending->op == CSV_WRITE;
    if (corked)
        cork(session, 1);
    issue_pending(session);
    if (corked)
        cork(session, 0);
}

void csv_ping(struct csv_session *session)
{
    if (iscsi_nop_out_async(session->context, on_ping, NULL, 0, session)) {
        csv_lose(session, "%s", iscsi_get_error(session->context));
        return;
    }
    session->ping_out = true;
    session->ping_sent_ms = session->now_ms;
}

/* -- giving up -------------------------------------------------------------------------------- */

void csv_check_deadlines(struct csv_session *session)
{
    uint64_t earliest_ms = UINT64_MAX;

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
    for (struct csv_piece *piece = session->oldest; piece; piece = piece->next)
        piece->deadline_ms += slept_ms;
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
        drop_pending_head(session);
        request->outcome = CSV_UNKNOWN;
        csv_finish(session, request);
    }
    session->earliest_deadline_ms = UINT64_MAX;
}
