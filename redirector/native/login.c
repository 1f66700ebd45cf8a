/* How a session comes up and goes down: libiscsi context, connection, login, redirection. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "internal.h"

enum { MAX_REDIRECTS = 4 };

bool csv_isid_valid(uint64_t isid)
{
    unsigned first = (unsigned)(isid >> 40) & 0xff;
    if (isid >> 48)
        return false;
    switch (first >> 6) {
    case 0:
        return true;
    case 1:
    case 2:
        return (first & 0x3f) == 0;
    default:
        return false;
    }
}

static void set_isid(struct iscsi_context *context, uint64_t isid)
{
    uint32_t middle = (uint32_t)(isid >> 16) & 0xffffff, last = (uint32_t)isid & 0xffff;

    switch (isid >> 46) {
    case 0:
        iscsi_set_isid_oui(context, (uint32_t)(isid >> 24) & 0x3fffff, (uint32_t)isid & 0xffffff);
        break;
    case 1:
        iscsi_set_isid_en(context, middle, last);
        break;
    default:
        iscsi_set_isid_random(context, middle, last);
        break;
    }
}

/* libiscsi reports a refused login only as text, which ends in "(status class and detail)". */
static int login_status(const char *text)
{
    const char *open = strrchr(text, '(');
    char *end;

    if (!strstr(text, "Failed to log in") || !open)
        return 0;
    long status = strtol(open + 1, &end, 10);
    return *end == ')' && status > 0 && status <= 0xffff ? (int)status : 0;
}

static void on_login(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_session *session = private;
    (void)data;

    if (session->destroying || session->losing)
        return;
    if (status == SCSI_STATUS_REDIRECT) {
        session->redirected = true;
        return;
    }
    if (status != SCSI_STATUS_GOOD) {
        session->login->status = login_status(iscsi_get_error(context));
        csv_lose_context(session);
        return;
    }
    struct csv_request *login = session->login;
    session->login = NULL;
    session->phase = CSV_UP;
    session->heard_ms = session->restless_ms = session->now_ms;
    login->outcome = CSV_DONE;
    csv_finish(session, login);
}

static void on_connect(struct iscsi_context *context, int status, void *data, void *private)
{
    struct csv_session *session = private;
    (void)data;

    if (session->destroying || session->losing || session->phase != CSV_CONNECTING)
        return; /* libiscsi calls a second time when the connection closes */
    if (status != SCSI_STATUS_GOOD || iscsi_login_async(context, on_login, session))
        csv_lose_context(session);
}

bool csv_login_start(struct csv_session *session)
{
    const struct csv_config *config = &session->config;
    struct iscsi_context *context = iscsi_create_context(session->initiator);

    session->phase = CSV_CONNECTING;
    session->context = context;
    if (!context) {
        csv_lose(session, "out of memory");
        return false;
    }
    iscsi_set_noautoreconnect(context, 1); /* what was sent once is never sent again by itself */
    set_isid(context, config->isid);
    iscsi_set_targetname(context, session->target);
    iscsi_set_session_type(context, ISCSI_SESSION_NORMAL);
    iscsi_set_header_digest(context, config->header_digest ? ISCSI_HEADER_DIGEST_CRC32C
                                                           : ISCSI_HEADER_DIGEST_NONE);
    /* With a user name libiscsi starts in the security stage, offering "CHAP,None": some targets
     * (tgt) reinstate a session only from there. One that wants CHAP refuses this name. */
    iscsi_set_initiator_username_pwd(context, session->user[0] ? session->user : "anonymous",
                                     session->user[0] ? session->password : "anonymous");
    if (iscsi_connect_async(context, session->portal, on_connect, session)) {
        csv_lose_context(session);
        return false;
    }
    fcntl(iscsi_get_fd(context), F_SETFD, FD_CLOEXEC); /* a child must not keep the nexus alive */
    return true;
}

/* A connection that is merely closed goes on to send what the kernel still holds, and stays while a
 * forked child has its descriptor. This one is reset. */
static void drop_connection(struct csv_session *session)
{
    struct sockaddr nowhere = {.sa_family = AF_UNSPEC};

    if (!session->logged_out)
        connect(iscsi_get_fd(session->context), &nowhere, sizeof nowhere);
}

void csv_context_destroy(struct csv_session *session)
{
    if (!session->context)
        return;
    session->destroying = true;
    drop_connection(session);
    iscsi_destroy_context(session->context);
    session->destroying = false;
    session->context = NULL;
    for (int i = 0; i < CSV_MAX_IN_FLIGHT; i++) {
        if (session->pieces[i].task)
            scsi_free_scsi_task(session->pieces[i].task);
        session->pieces[i].task = NULL;
    }
}

/* libiscsi would look a name up in this thread, for as long as that takes. */
static bool numeric(const char *portal)
{
    if (portal[0] == '[')
        return portal[1 + strspn(portal + 1, "0123456789abcdefABCDEF:.")] == ']';
    return portal[strspn(portal, "0123456789.:,")] == '\0';
}

/* The target asks to log in at another portal of its (RFC 7143 11.13.5, status class 1). */
void csv_login_redirect(struct csv_session *session)
{
    char portal[CSV_TEXT_BYTES];

    session->redirected = false;
    snprintf(portal, sizeof portal, "%s", iscsi_get_target_address(session->context));
    if (!portal[0] || ++session->redirects > MAX_REDIRECTS) {
        csv_lose(session, "the target redirects without end");
        return;
    }
    if (!numeric(portal)) {
        csv_lose(session, "the target redirects to %.200s, which is no IP address", portal);
        return;
    }
    csv_context_destroy(session);
    portal[strcspn(portal, ",")] = '\0'; /* a portal group tag may follow */
    snprintf(session->portal, sizeof session->portal, "%s", portal);
    csv_login_start(session);
}
