"""What is encoded comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from csvfs import format as fmt
from csvfs.format import BlockType, Geometry

VOLUME = bytes(range(16))
u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
versions = st.integers(1, fmt.VERSION_LIMIT - 1)
times = st.integers(-(1 << 63), (1 << 63) - 1)
slot_numbers = st.integers(0, fmt.MAX_SLOTS - 1)


def texts(size_bytes: int, *, empty: bool = True) -> st.SearchStrategy[str]:
    """Text that fits a field of that many bytes."""
    letters = st.characters(codec="utf-8", exclude_characters="\0")
    return st.text(letters, min_size=0 if empty else 1, max_size=size_bytes).filter(
        lambda text: len(text.encode()) <= size_bytes
    )


def blobs(size_bytes: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size_bytes, max_size=size_bytes)


addresses = st.lists(texts(fmt.ADDRESS_BYTES, empty=False), max_size=fmt.MAX_ADDRESSES).map(tuple)
certificates = st.binary(max_size=fmt.MAX_CERTIFICATE_BYTES)
geometries = st.builds(
    Geometry.for_lun,
    st.integers(fmt.MIN_LUN_BYTES, 1 << 46),
    st.integers(1, 32),
    st.just(fmt.MIN_JOURNAL_BYTES),
)
superblocks = st.builds(
    fmt.Superblock,
    volume_id=blobs(16),
    geometry=geometries,
    created_ns=times,
    label=texts(fmt.LABEL_BYTES),
    device_id=st.binary(max_size=fmt.DEVICE_ID_BYTES),
    vendor=texts(16),
    product=texts(32),
    serial=texts(96),
    probe=st.integers(0, (1 << 12) - 1).map(fmt.ProbeFlag),
    write_cache=st.sampled_from(fmt.WriteCache),
    compat=u64,
    ro_compat=u64,
    incompat=u64,
)
view_slots = st.builds(
    fmt.ViewSlot,
    incarnation=u32,
    state=st.sampled_from(fmt.SlotState),
    replay_by=u8,
    fingerprint=blobs(fmt.FINGERPRINT_BYTES),
    node_name=texts(fmt.NODE_NAME_BYTES),
    since_ns=times,
    flags=st.integers(0, 1).map(fmt.ViewSlotFlag),
    machine_id=blobs(16),
    boot_id=blobs(16),
    addresses=addresses,
)
views = st.builds(
    fmt.View,
    epoch=st.integers(8, fmt.VERSION_LIMIT - 1),
    holder_key=u64,
    slots=st.lists(view_slots, min_size=1, max_size=6).map(tuple),
    secret=blobs(fmt.SECRET_BYTES),
    written_ns=times,
    lock_epoch=st.integers(0, 8),
)
identities = st.builds(
    fmt.Identity,
    incarnation=u32,
    generation=u32,
    key=u64,
    since_ns=times,
    machine_id=blobs(16),
    boot_id=blobs(16),
    node_name=texts(fmt.NODE_NAME_BYTES),
    addresses=addresses,
    certificate=certificates,
)
sessions = st.builds(
    fmt.Session,
    kind=st.sampled_from([fmt.SessionKind.DATA, fmt.SessionKind.CONTROL]),
    generation=u16,
    key=u64,
    initiator_name=texts(fmt.INITIATOR_NAME_BYTES - 1),
    isid=st.integers(0, (1 << 48) - 1),
    portal=texts(fmt.PORTAL_BYTES),
    portal_group=u32,
    carrier=u8,
)
slot_blocks = st.builds(
    fmt.SlotBlock,
    slot=slot_numbers,
    identity=identities,
    sessions=st.lists(sessions, max_size=fmt.MAX_SESSIONS).map(tuple),
)
heartbeats = st.builds(
    fmt.Heartbeat,
    slot=slot_numbers,
    incarnation=u32,
    sequence=st.integers(0, fmt.VERSION_LIMIT - 2),
    epoch=u64,
    hears=u64,
    flags=st.integers(0, 3).map(fmt.HeartbeatFlag),
)


@st.composite
def join_requests(draw: st.DrawFn) -> fmt.JoinRequest:
    certificate = draw(st.binary(min_size=1, max_size=fmt.MAX_CERTIFICATE_BYTES))
    return fmt.JoinRequest(
        slot=draw(slot_numbers),
        key=draw(u64),
        sequence=draw(st.integers(0, fmt.VERSION_LIMIT - 2)),
        node_name=draw(texts(fmt.NODE_NAME_BYTES)),
        machine_id=draw(blobs(16)),
        boot_id=draw(blobs(16)),
        fingerprint=fmt.certificate_fingerprint(certificate),
        addresses=draw(addresses),
        certificate=certificate,
    )


@given(superblocks, versions)
def test_superblock(superblock: fmt.Superblock, version: int) -> None:
    for address in (0, superblock.geometry.backup_superblock):
        block = superblock.encode(address, version)
        assert fmt.Superblock.decode(block, address) == superblock
        assert fmt.Superblock.decode(block, address, superblock.volume_id) == superblock


@given(views)
def test_view(view: fmt.View) -> None:
    address = fmt.view_address(view.epoch)
    assert fmt.decode_view(fmt.encode_view(view, VOLUME), address, VOLUME) == view


@given(slot_blocks, versions, u32)
def test_slot_block(block: fmt.SlotBlock, version: int, address: int) -> None:
    encoded = block.encode(VOLUME, address, version)
    assert fmt.SlotBlock.decode(encoded, address, VOLUME, block.slot) == (block, version)


@given(heartbeats, u32)
def test_heartbeat(heartbeat: fmt.Heartbeat, address: int) -> None:
    encoded = fmt.encode_heartbeat(heartbeat, VOLUME, address)
    assert fmt.decode_heartbeat(encoded, address, VOLUME, heartbeat.slot) == heartbeat


@given(join_requests(), u32)
def test_join_block(request: fmt.JoinRequest, address: int) -> None:
    encoded = fmt.encode_join(request, VOLUME, address)
    assert fmt.decode_join(encoded, address, VOLUME, request.slot) == request
    assert fmt.block_version(encoded) == request.sequence + 1


@given(slot_numbers, u32, u64, u32, u32, versions)
def test_journal_header(
    slot: int, incarnation: int, sequence: int, position: int, address: int, version: int
) -> None:
    header = fmt.JournalHeader(slot, incarnation, sequence, position)
    encoded = header.encode(VOLUME, address, version)
    assert fmt.JournalHeader.decode(encoded, address, VOLUME, slot) == (header, version)


@given(slot_numbers, u32, u64, st.integers(0, 2000), st.integers(0, 2000))
def test_record_header(
    slot: int, incarnation: int, sequence: int, images: int, revokes: int
) -> None:
    header = fmt.RecordHeader(slot, incarnation, sequence, images, revokes)
    block = fmt.new_block(BlockType.JOURNAL_RECORD, 7, slot, VOLUME)
    header.pack_into(block)
    assert fmt.RecordHeader.unpack(block, 7) == header
    entries = 16 * images + 8 * revokes
    assert header.header_blocks * 4096 >= 96 + entries > (header.header_blocks - 1) * 4096


@given(st.integers(0, 1000), st.data())
def test_group_header(index: int, data: st.DataObject) -> None:
    units = data.draw(st.integers(2, fmt.GROUP_UNITS))
    ready = data.draw(st.integers(0, (1 << fmt.MAPS_PER_GROUP) - 1))
    header = fmt.GroupHeader(
        index,
        data.draw(st.integers(1, 1 << 40)),
        units,
        data.draw(st.integers(0, units - 1)),
        data.draw(u32),
        ready,
        fmt.GroupFlag.NONE if ready else fmt.GroupFlag.UNINIT,
    )
    block = header.encode(VOLUME, 9)
    assert fmt.GroupHeader.decode(block, header.address, VOLUME, index) == header
