/* From a request to commands on the wire.
 *
 * The window. A command beyond the target's MaxCmdSN would wait inside libiscsi, where it blocks the
 * pings behind it. libiscsi does not show MaxCmdSN, only that its queue does not move though the
 * socket would take more. So a number of commands in flight that was never tried is approached one
 * by one; when the window closes, the session stays two below it (one place for a ping), and dares
 * more after a time that grows while that fails: with a command held back no NOP-Out gets through.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "internal.h"

enum {
    PING_RESERVE = 2,
    WIDEN_MOST_MS = 64000,
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

void csv_drop_pending_head(struct csv_session *session)
{
    session->pending = session->pending->next;
    if (!session->pending)
        session->pending_last = NULL;
}

static struct csv_piece *new_piece(struct csv_session *session, struct csv_request *request)
{
    struct csv_piece *piece = session->free_pieces;

    session->free_pieces = piece->next;
    piece->request = request;
    piece->deadline_ms = request->timeout_ms ? session->now_ms + request->timeout_ms : UINT64_MAX;
    if (piece->deadline_ms < session->earliest_deadline_ms)
        session->earliest_deadline_ms = piece->deadline_ms;
    piece->next = NULL;
    piece->previous = session->newest;
    if (session->newest) {
        session->newest->next = piece;
    } else {
        session->oldest = piece;
        session->oldest_since_ms = session->now_ms;
    }
    session->newest = piece;
    session->in_flight++;
    request->outstanding++;
    csv_show_in_flight(session);
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

static bool prepare_task(struct csv_piece *piece, uint8_t *cdb, int cdb_bytes,
                         enum csv_direction direction)
{
    int bytes = (int)piece->data.iov_len;
    int way = direction == CSV_DATA_IN    ? SCSI_XFER_READ
              : direction == CSV_DATA_OUT ? SCSI_XFER_WRITE
                                          : SCSI_XFER_NONE;
    struct scsi_task *task = piece->task;

    if (!task) {
        task = piece->task = scsi_create_task(cdb_bytes, cdb, way, bytes);
        if (!task)
            return false;
    }
    free(task->datain.data);
    *task = (struct scsi_task){.cdb_size = cdb_bytes, .xfer_dir = way, .expxferlen = bytes};
    memcpy(task->cdb, cdb, (size_t)cdb_bytes);
    if (direction == CSV_DATA_IN)
        scsi_task_set_iov_in(task, &piece->data, 1);
    else if (direction == CSV_DATA_OUT)
        scsi_task_set_iov_out(task, &piece->data, 1);
    return true;
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
    if (request->op == CSV_READ)
        memcpy(csv_last_bytes(piece), &session->no_data, sizeof session->no_data);
    return prepare_task(piece, cdb, cdb_bytes, direction) &&
           iscsi_scsi_command_async(session->context, (int)session->config.lun, piece->task,
                                    csv_on_scsi, NULL, piece) == 0;
}

static bool issue_one(struct csv_session *session, struct csv_request *request)
{
    if (request->op == CSV_TASK) {
        struct csv_piece *piece = new_piece(session, request);
        return iscsi_task_mgmt_async(session->context, (int)session->config.lun, request->function,
                                     0xffffffff, 0, csv_on_task_management, piece) == 0;
    }
    if (request->op == CSV_LOGOUT) {
        struct csv_piece *piece = new_piece(session, request);
        return iscsi_logout_async(session->context, csv_on_logout, piece) == 0;
    }
    return issue_scsi(session, request);
}

/* Put on the wire what libiscsi has. False while it keeps something back. */
static bool push_out(struct csv_session *session)
{
    if (iscsi_service(session->context, POLLOUT) < 0) {
        csv_lose_context(session);
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
        session->widen_every_ms *= 4;
        if (session->widen_every_ms > WIDEN_MOST_MS)
            session->widen_every_ms = WIDEN_MOST_MS;
        session->widen_at_ms = session->now_ms + session->widen_every_ms;
    }
    return !wants_socket && queued == 0;
}

static void widen_window(struct csv_session *session)
{
    if (session->window >= session->config.max_in_flight || session->now_ms < session->widen_at_ms)
        return;
    session->window += session->window / 4 + 1;
    if (session->window > session->config.max_in_flight)
        session->window = session->config.max_in_flight;
    session->widen_at_ms = session->now_ms + session->widen_every_ms;
    if (session->widen_every_ms > CSV_WIDEN_LEAST_MS)
        session->widen_every_ms /= 2;
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
            csv_drop_pending_head(session);
            continue;
        }
        bool sent = issue_one(session, request);
        if (request->issued == request->length)
            csv_drop_pending_head(session);
        if (!sent) {
            csv_lose_context(session);
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
