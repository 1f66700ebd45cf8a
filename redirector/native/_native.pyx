# cython: language_level=3, boundscheck=False, wraparound=False
"""The boundary between Python and session.c: see `_native.pyi` for what it offers.

A request in flight holds a `Py_buffer` (so that the bytes neither move nor go away) and a reference to
the token of whoever waits for it. Both are given back by `Session.reap`.
"""

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from cpython.mem cimport PyMem_RawCalloc, PyMem_RawFree
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport INFINITY
from libc.stdint cimport INT64_MIN, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    struct sockaddr:
        pass
    struct sockaddr_storage:
        pass


cdef extern from "<netdb.h>" nogil:
    struct addrinfo:
        int ai_flags
        int ai_socktype
        socklen_t ai_addrlen
        sockaddr *ai_addr
    int AI_NUMERICHOST, AI_NUMERICSERV
    int getaddrinfo(const char *host, const char *port, const addrinfo *hints, addrinfo **found)
    void freeaddrinfo(addrinfo *found)
    int SOCK_DGRAM


cdef extern from "session.h" nogil:
    int CSV_MAX_IN_FLIGHT
    enum csv_op:
        CSV_LOGIN, CSV_READ, CSV_WRITE, CSV_SCSI, CSV_TASK, CSV_LOGOUT
    enum csv_direction:
        CSV_NO_DATA, CSV_DATA_IN, CSV_DATA_OUT
    enum csv_outcome:
        CSV_DONE, CSV_REFUSED, CSV_UNKNOWN
    struct csv_session:
        pass
    struct csv_request:
        csv_request *next
        csv_op op
        csv_direction direction
        bint fua
        uint8_t function
        uint8_t cdb_bytes
        uint8_t cdb[16]
        uint64_t lba
        void *buffer
        uint32_t length
        uint32_t timeout_ms
        csv_outcome outcome
        int status
        uint32_t residual
        uint8_t sense_bytes
        uint8_t sense[96]
    struct csv_config:
        const char *portal
        const char *target
        const char *initiator
        const char *user
        const char *password
        uint64_t isid
        uint32_t lun
        bint header_digest
        uint32_t login_timeout_ms
        uint32_t command_timeout_ms
        uint32_t ping_interval_ms
        uint32_t ping_timeout_ms
        uint32_t patience_ms
        uint32_t calm_ms
        uint32_t max_in_flight
    struct csv_statistics:
        uint64_t commands
        uint64_t pings
        uint32_t in_flight
        uint32_t peak_in_flight
        uint32_t window
        uint32_t patience_ms
    bint csv_isid_valid(uint64_t isid)
    csv_session *csv_session_open(const csv_config *config, csv_request *login)
    void csv_session_set_geometry(csv_session *session, uint32_t block, uint32_t max_transfer)
    void csv_session_submit(csv_session *session, csv_request *request)
    int csv_session_fd(const csv_session *session)
    csv_request *csv_session_reap(csv_session *session)
    void csv_session_abort(csv_session *session)
    bint csv_session_lost(const csv_session *session)
    const char *csv_session_text(const csv_session *session)
    const char *csv_session_portal(const csv_session *session)
    uint32_t csv_session_silent_ms(const csv_session *session)
    void csv_session_statistics(csv_session *session, csv_statistics *statistics)
    void csv_session_close(csv_session *session)
    void csv_session_free(csv_session *session)


cdef extern from "pulse.h" nogil:
    int CSV_BLOCK_BYTES, CSV_CLUSTER_ID_BYTES, CSV_SECRET_BYTES
    struct csv_pulse:
        pass
    struct csv_pulse_config:
        int socket
        uint8_t cluster_id[16]
        uint32_t interval_ms
        uint32_t alive_ms
        uint32_t lease_ms
    struct csv_life:
        uint8_t slot
        uint32_t incarnation
        uint32_t flags
        uint64_t epoch
        uint64_t hears
    struct csv_target:
        sockaddr_storage address
        socklen_t length
    struct csv_pulse_news:
        uint64_t written
        uint64_t key
        int64_t sent_ns
        bint failed
        csv_outcome outcome
        int status
        uint32_t residual
        uint8_t sense_bytes
        uint8_t sense[96]
    struct csv_pulse_statistics:
        uint64_t sent
        uint64_t not_sent
        uint64_t written
        uint64_t failed
        uint64_t silences
        int64_t gap_ns
        int64_t gap_most_ns
        int64_t write_ns
        int64_t write_most_ns
    csv_pulse *csv_pulse_open(const csv_pulse_config *config)
    void csv_pulse_address(csv_pulse *pulse, const uint8_t *secret, csv_target *targets, size_t n)
    void csv_pulse_show(csv_pulse *pulse, const csv_life *life, const uint8_t *block, bint now)
    void csv_pulse_stamp(csv_pulse *pulse)
    void csv_pulse_attach(csv_pulse *pulse, csv_session *session, uint64_t key, uint64_t lba)
    void csv_pulse_detach(csv_pulse *pulse, const csv_session *session)
    bint csv_pulse_writing(csv_pulse *pulse)
    uint64_t csv_pulse_next_sequence(csv_pulse *pulse)
    int64_t csv_pulse_lease_ns(const csv_pulse *pulse)
    int csv_pulse_fd(const csv_pulse *pulse)
    void csv_pulse_reap(csv_pulse *pulse, csv_pulse_news *news)
    void csv_pulse_statistics_of "csv_pulse_statistics"(csv_pulse *pulse, csv_pulse_statistics *shown)
    void csv_pulse_stop(csv_pulse *pulse)
    void csv_pulse_free(csv_pulse *pulse)


cdef struct pinned_request:
    csv_request request  # first: the session hands back its address
    Py_buffer view
    bint pinned
    PyObject *token


MAX_IN_FLIGHT = CSV_MAX_IN_FLIGHT


def isid_valid(isid):
    return 0 <= isid < 1 << 48 and csv_isid_valid(isid)


cdef class Completion:
    cdef readonly bint unknown
    cdef readonly int status
    cdef readonly bytes sense
    cdef readonly unsigned int residual

    def __repr__(self):
        return (f"Completion(unknown={self.unknown}, status={self.status:#x}, "
                f"sense={self.sense.hex()!r}, residual={self.residual})")


cdef Completion _completion(csv_request *request):
    cdef Completion completion = Completion.__new__(Completion)
    completion.unknown = request.outcome == CSV_UNKNOWN
    completion.status = request.status
    completion.sense = PyBytes_FromStringAndSize(<char *>request.sense, request.sense_bytes)
    completion.residual = request.residual
    return completion


@cython.no_gc_clear  # `__dealloc__` needs the pulse
cdef class Session:
    cdef csv_session *_session
    cdef Pulse _pulse  # that writes on it, or has: it lives longer
    cdef uint32_t _block_bytes
    cdef readonly unsigned int outstanding

    def __init__(self, token, *, str portal, str target, str initiator, isid, lun, str user="",
                 str password="", bint header_digest=False, login_timeout_ms=10_000,
                 command_timeout_ms=30_000, ping_interval_ms=500, ping_timeout_ms=2_000,
                 patience_ms=0, calm_ms=60_000, max_in_flight=120):
        cdef csv_config config
        cdef pinned_request *login
        if self._session != NULL:
            raise RuntimeError("the session is open already")
        if not isid_valid(isid):
            raise ValueError(f"libiscsi cannot express the ISID {isid:#014x}")
        if not 0 < max_in_flight <= CSV_MAX_IN_FLIGHT:
            raise ValueError(f"max_in_flight is 1 to {CSV_MAX_IN_FLIGHT}, not {max_in_flight}")
        if not 0 <= lun < 1 << 14:
            raise ValueError(f"a LUN is 0 to 16383, not {lun}")
        texts = [text.encode() for text in (portal, target, initiator, user, password)]
        for text in texts:
            if len(text) > 223 or b"\0" in text:
                raise ValueError("a name has at most 223 bytes, none of them 0")
        config.portal, config.target, config.initiator = texts[0], texts[1], texts[2]
        config.user, config.password = texts[3], texts[4]
        config.isid = isid
        config.lun = lun
        config.header_digest = header_digest
        config.login_timeout_ms = login_timeout_ms
        config.command_timeout_ms = command_timeout_ms
        config.ping_interval_ms = ping_interval_ms
        config.ping_timeout_ms = ping_timeout_ms
        config.patience_ms = patience_ms
        config.calm_ms = calm_ms
        config.max_in_flight = max_in_flight
        login = self._new(CSV_LOGIN, None, 0, token)
        self._session = csv_session_open(&config, &login.request)
        if self._session == NULL:
            self._release(login)
            PyErr_SetFromErrno(OSError)

    def __dealloc__(self):
        self._end(None)

    cdef int _end(self, list ended) except -1:
        cdef csv_session *session = self._session
        if session == NULL:
            return 0
        self._session = NULL  # to other threads it is closed from here on
        if self._pulse is not None:
            csv_pulse_detach(self._pulse._pulse, session)
        with nogil:
            csv_session_close(session)
        self._reap_into(session, ended)
        csv_session_free(session)
        return 0

    cdef pinned_request *_new(self, csv_op op, object buffer, int flags, object token) except NULL:
        cdef pinned_request *pinned
        pinned = <pinned_request *>PyMem_RawCalloc(1, sizeof(pinned_request))
        if pinned == NULL:
            raise MemoryError
        pinned.request.op = op
        if buffer is not None:
            try:
                PyObject_GetBuffer(buffer, &pinned.view, flags)
            except BaseException:
                PyMem_RawFree(pinned)
                raise
            pinned.pinned = True
            if pinned.view.len > 0x7fffffff:
                PyBuffer_Release(&pinned.view)
                PyMem_RawFree(pinned)
                raise ValueError("a transfer is shorter than 2 GiB")
            pinned.request.buffer = pinned.view.buf
            pinned.request.length = <uint32_t>pinned.view.len
        Py_INCREF(token)
        pinned.token = <PyObject *>token
        self.outstanding += 1
        return pinned

    cdef void _release(self, pinned_request *pinned):
        if pinned.pinned:
            PyBuffer_Release(&pinned.view)
        Py_DECREF(<object>pinned.token)
        PyMem_RawFree(pinned)
        self.outstanding -= 1

    cdef int _submit(self, pinned_request *pinned) except -1:
        if self._session == NULL:
            self._release(pinned)
            raise ValueError("the session is closed")
        csv_session_submit(self._session, &pinned.request)
        return 0

    cdef int _transfer(self, csv_op op, int64_t offset_bytes, object buffer, int flags, bint fua,
                       object token) except -1:
        cdef pinned_request *pinned = self._new(op, buffer, flags, token)
        cdef uint32_t block = self._block_bytes
        if block == 0 or pinned.request.length == 0 or offset_bytes < 0 \
                or <uint64_t>offset_bytes % block or pinned.request.length % block:
            length = pinned.request.length
            self._release(pinned)
            raise ValueError(f"offset {offset_bytes} and length {length} must be multiples of the "
                             f"logical block of {block} bytes, and not empty")
        pinned.request.lba = <uint64_t>offset_bytes // block
        pinned.request.fua = fua
        return self._submit(pinned)

    def set_geometry(self, block_bytes, max_transfer_bytes):
        if self._session == NULL:
            raise ValueError("the session is closed")
        if not 0 < block_bytes <= max_transfer_bytes:
            raise ValueError("a transfer is at least one block")
        csv_session_set_geometry(self._session, block_bytes, max_transfer_bytes)
        self._block_bytes = block_bytes

    def read(self, int64_t offset_bytes, buffer, token):
        self._transfer(CSV_READ, offset_bytes, buffer, PyBUF_WRITABLE, False, token)

    def write(self, int64_t offset_bytes, data, bint fua, token):
        self._transfer(CSV_WRITE, offset_bytes, data, PyBUF_SIMPLE, fua, token)

    def scsi(self, bytes cdb, token, *, data_in=None, data_out=None, timeout_ms=0):
        cdef pinned_request *pinned
        cdef uint32_t limit_ms = timeout_ms
        if not 6 <= len(cdb) <= 16:
            raise ValueError("a command block has 6 to 16 bytes")
        if data_in is not None and data_out is not None:
            raise ValueError("a command moves data one way")
        if data_in is not None:
            pinned = self._new(CSV_SCSI, data_in, PyBUF_WRITABLE, token)
            pinned.request.direction = CSV_DATA_IN
        else:
            pinned = self._new(CSV_SCSI, data_out, PyBUF_SIMPLE, token)
            pinned.request.direction = CSV_NO_DATA if data_out is None else CSV_DATA_OUT
        pinned.request.cdb_bytes = <uint8_t>len(cdb)
        memcpy(pinned.request.cdb, <char *>cdb, len(cdb))
        pinned.request.timeout_ms = limit_ms
        self._submit(pinned)

    def task_management(self, uint8_t function, token, *, timeout_ms=0):
        cdef uint32_t limit_ms = timeout_ms
        cdef pinned_request *pinned = self._new(CSV_TASK, None, 0, token)
        pinned.request.function = function
        pinned.request.timeout_ms = limit_ms
        self._submit(pinned)

    def logout(self, token, *, timeout_ms=0):
        cdef uint32_t limit_ms = timeout_ms
        cdef pinned_request *pinned = self._new(CSV_LOGOUT, None, 0, token)
        pinned.request.timeout_ms = limit_ms
        self._submit(pinned)

    cdef int _reap_into(self, csv_session *session, list ended) except -1:
        cdef csv_request *request = csv_session_reap(session)
        cdef csv_request *later
        cdef pinned_request *pinned
        while request != NULL:
            later = request.next
            pinned = <pinned_request *>request
            if ended is not None:
                if request.outcome == CSV_DONE and request.residual == 0:
                    ended.append((<object>pinned.token, None))
                else:
                    ended.append((<object>pinned.token, _completion(request)))
            self._release(pinned)
            request = later
        return 0

    def reap(self):
        cdef list ended = []
        if self._session != NULL:
            self._reap_into(self._session, ended)
        return ended

    def abort(self):
        if self._session != NULL:
            csv_session_abort(self._session)

    def close(self):
        cdef list ended = []
        self._end(ended)
        return ended

    def fileno(self):
        return -1 if self._session == NULL else csv_session_fd(self._session)

    @property
    def lost(self):
        return self._session == NULL or csv_session_lost(self._session)

    @property
    def text(self):
        if self._session == NULL:
            return ""
        return csv_session_text(self._session).decode(errors="replace")

    @property
    def portal(self):
        return "" if self._session == NULL else csv_session_portal(self._session).decode()

    @property
    def silent_ms(self):
        return 0 if self._session == NULL else csv_session_silent_ms(self._session)

    def statistics(self):
        cdef csv_statistics shown
        if self._session == NULL:
            raise ValueError("the session is closed")
        csv_session_statistics(self._session, &shown)
        return {
            "commands": shown.commands,
            "pings": shown.pings,
            "in_flight": shown.in_flight,
            "peak_in_flight": shown.peak_in_flight,
            "window": shown.window,
            "patience_ms": shown.patience_ms,
        }


cdef class Pulse:
    cdef csv_pulse *_pulse

    def __init__(self, int socket_fd, bytes cluster_id, *, interval_ms, alive_ms, lease_ms):
        cdef csv_pulse_config config
        if self._pulse != NULL:
            raise RuntimeError("the pulse is open already")
        if len(cluster_id) != CSV_CLUSTER_ID_BYTES:
            raise ValueError(f"a cluster id has {CSV_CLUSTER_ID_BYTES} bytes")
        if min(interval_ms, alive_ms, lease_ms) < 1:
            raise ValueError("times are at least 1 ms")
        config.socket = socket_fd
        memcpy(config.cluster_id, <char *>cluster_id, CSV_CLUSTER_ID_BYTES)
        config.interval_ms, config.alive_ms, config.lease_ms = interval_ms, alive_ms, lease_ms
        self._pulse = csv_pulse_open(&config)
        if self._pulse == NULL:
            PyErr_SetFromErrno(OSError)

    def __cinit__(self):
        self._pulse = NULL

    def __dealloc__(self):
        cdef csv_pulse *pulse = self._pulse
        self._pulse = NULL
        if pulse != NULL:
            with nogil:
                csv_pulse_free(pulse)

    cdef int _expect_open(self) except -1:
        if self._pulse == NULL:
            raise ValueError("the pulse was not opened")
        return 0

    def address(self, bytes secret, targets):
        cdef csv_target *found
        cdef addrinfo hints
        cdef addrinfo *answer
        cdef size_t count = 0
        self._expect_open()
        if len(secret) != CSV_SECRET_BYTES:
            raise ValueError(f"a secret has {CSV_SECRET_BYTES} bytes")
        wanted = [(host.encode(), str(int(port)).encode()) for host, port in targets]
        found = <csv_target *>calloc(len(wanted) + 1, sizeof(csv_target))
        if found == NULL:
            raise MemoryError
        memset(&hints, 0, sizeof(hints))
        hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV
        hints.ai_socktype = SOCK_DGRAM
        for host, port in wanted:
            if getaddrinfo(host, port, &hints, &answer):
                free(found)
                raise ValueError(f"{host.decode()} is no numeric address")
            memcpy(&found[count].address, answer.ai_addr, answer.ai_addrlen)
            found[count].length = answer.ai_addrlen
            freeaddrinfo(answer)
            count += 1
        csv_pulse_address(self._pulse, <const uint8_t *><char *>secret, found, count)

    def show(self, *, slot, incarnation, flags, epoch, hears, bytes block, bint now):
        cdef csv_life life
        self._expect_open()
        if len(block) != CSV_BLOCK_BYTES:
            raise ValueError(f"a block has {CSV_BLOCK_BYTES} bytes")
        life.slot, life.incarnation, life.flags = slot, incarnation, flags
        life.epoch, life.hears = epoch, hears
        csv_pulse_show(self._pulse, &life, <const uint8_t *><char *>block, now)

    def stamp(self):
        if self._pulse != NULL:
            csv_pulse_stamp(self._pulse)

    def attach(self, Session session not None, uint64_t key, uint64_t offset_bytes):
        self._expect_open()
        if session._session == NULL or csv_session_lost(session._session):
            return False
        if session._pulse is not None and session._pulse is not self:
            raise ValueError("the session has another pulse")
        if not session._block_bytes or offset_bytes % session._block_bytes \
                or CSV_BLOCK_BYTES % session._block_bytes:
            raise ValueError("a heartbeat block is whole logical blocks")
        session._pulse = self
        csv_pulse_attach(self._pulse, session._session, key, offset_bytes // session._block_bytes)
        return True

    def detach(self):
        if self._pulse != NULL:
            csv_pulse_detach(self._pulse, NULL)

    @property
    def writing(self):
        return self._pulse != NULL and csv_pulse_writing(self._pulse)

    def next_sequence(self):
        self._expect_open()
        return csv_pulse_next_sequence(self._pulse)

    @property
    def lease_until_s(self):
        cdef int64_t until = INT64_MIN if self._pulse == NULL else csv_pulse_lease_ns(self._pulse)
        return -INFINITY if until == INT64_MIN else until * 1e-9

    def fileno(self):
        return -1 if self._pulse == NULL else csv_pulse_fd(self._pulse)

    def reap(self):
        cdef csv_pulse_news news
        cdef Completion completion = None
        self._expect_open()
        csv_pulse_reap(self._pulse, &news)
        if news.failed:
            completion = Completion.__new__(Completion)
            completion.unknown = news.outcome == CSV_UNKNOWN
            completion.status = news.status
            completion.sense = PyBytes_FromStringAndSize(<char *>news.sense, news.sense_bytes)
            completion.residual = news.residual
        return news.key, news.sent_ns * 1e-9 if news.written else None, completion

    def stop(self):
        if self._pulse != NULL:
            csv_pulse_stop(self._pulse)

    def statistics(self):
        cdef csv_pulse_statistics shown
        self._expect_open()
        csv_pulse_statistics_of(self._pulse, &shown)
        return {
            "sent": shown.sent,
            "not_sent": shown.not_sent,
            "written": shown.written,
            "failed": shown.failed,
            "silences": shown.silences,
            "gap_s": shown.gap_ns * 1e-9,
            "gap_most_s": shown.gap_most_ns * 1e-9,
            "write_s": shown.write_ns * 1e-9,
            "write_most_s": shown.write_most_ns * 1e-9,
        }
