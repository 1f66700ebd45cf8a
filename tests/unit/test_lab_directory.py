"""The model of a directory accepts what can have happened, and nothing else."""

from __future__ import annotations

import errno

from csvctl.lab.directory_model import Call, directory, is_possible

Content = dict[str, tuple[int, tuple[str, ...]]]


def call(host: int, words: str, result: int, begun: int, ended: int) -> Call:
    kind, *arguments = words.split()
    return Call(host, kind, tuple(arguments), result, begun, ended)


def possible(before: Content, calls: list[Call], after: Content, hosts: int = 2) -> bool:
    return is_possible(directory(before, hosts), calls, after)


EXISTS, NONE = -errno.EEXIST, -errno.ENOENT


def test_of_two_who_create_one_name_one_wins() -> None:
    one = call(0, "create a", 5, 0, 10)
    assert possible({}, [one, call(1, "create a", EXISTS, 0, 10)], {"a": (5, ())})
    assert not possible({}, [one, call(1, "create a", 6, 0, 10)], {"a": (5, ())})
    both = [call(0, "create a", EXISTS, 0, 10), call(1, "create a", EXISTS, 0, 10)]
    assert not possible({}, both, {})


def test_of_two_who_unlink_one_name_one_wins() -> None:
    one = call(0, "unlink a", 0, 0, 10)
    assert possible({"a": (5, ())}, [one, call(1, "unlink a", NONE, 0, 10)], {})
    assert not possible({"a": (5, ())}, [one, call(1, "unlink a", 0, 0, 10)], {})


def test_the_order_of_what_did_not_overlap_is_kept() -> None:
    calls = [call(0, "create a", 5, 0, 10), call(1, "unlink a", 0, 20, 30)]
    assert possible({}, calls, {})
    early = [call(0, "create a", 5, 20, 30), call(1, "unlink a", 0, 0, 10)]
    assert not possible({}, early, {})
    unseen = [call(0, "create a", 5, 0, 10), call(1, "unlink a", NONE, 20, 30)]
    assert not possible({}, unseen, {"a": (5, ())})


def test_a_rename_replaces_and_takes_the_content_along() -> None:
    before: Content = {"a": (5, ("x",)), "b": (6, ())}
    assert possible(before, [call(0, "rename a b", 0, 0, 10)], {"b": (5, ("x",))})
    assert not possible(before, [call(0, "rename a b", 0, 0, 10)], {"b": (6, ())})
    assert not possible(before, [call(0, "rename a b", 0, 0, 10)], before)


def test_of_two_who_rename_one_name_to_another_both_may_succeed_if_they_overlap() -> None:
    before: Content = {"a": (5, ("x",))}
    after: Content = {"b": (5, ("x",))}
    one = call(0, "rename a b", 0, 0, 10)
    assert possible(before, [one, call(1, "rename a b", 0, 0, 10)], after)
    assert possible(before, [one, call(1, "rename a b", NONE, 0, 10)], after)
    # Whoever comes later finds no source; and nobody succeeds where the other put another file.
    assert not possible(before, [one, call(1, "rename a b", 0, 20, 30)], after)
    assert not possible(before, [one, call(1, "rename a c", 0, 0, 10)], after)
    assert not possible({}, [one, call(1, "rename a b", 0, 0, 10)], {})


def test_what_a_rename_found_is_not_found_by_the_next() -> None:
    calls = [
        call(0, "rename a b", 0, 0, 10),
        call(1, "rename a b", 0, 0, 10),
        call(1, "rename a b", 0, 20, 30),
    ]
    assert not possible({"a": (5, ())}, calls, {"b": (5, ())})


def test_appends_of_two_hosts_are_both_there_in_either_order() -> None:
    calls = [
        call(0, "open a", 5, 0, 1),
        call(0, "write x", 0, 2, 9),
        call(1, "open a", 5, 0, 1),
        call(1, "write y", 0, 2, 9),
    ]
    before: Content = {"a": (5, ())}
    assert possible(before, calls, {"a": (5, ("x", "y"))})
    assert possible(before, calls, {"a": (5, ("y", "x"))})
    for wrong in (("x",), ("y",), (), ("x", "y", "y"), ("x", "z")):
        assert not possible(before, calls, {"a": (5, wrong)})


def test_an_append_goes_to_the_file_that_was_opened_wherever_it_is_now() -> None:
    calls = [
        call(0, "open a", 5, 0, 1),
        call(1, "rename a b", 0, 2, 3),
        call(0, "write x", 0, 4, 5),
    ]
    assert possible({"a": (5, ())}, calls, {"b": (5, ("x",))})
    assert not possible({"a": (5, ())}, calls, {"b": (5, ())})


def test_an_inode_number_that_comes_again_is_another_file() -> None:
    calls = [
        call(0, "open a", 5, 0, 1),
        call(1, "unlink a", 0, 2, 3),
        call(1, "create a", 5, 4, 5),
        call(0, "write x", 0, 6, 7),
    ]
    assert possible({"a": (5, ())}, calls, {"a": (5, ())})
    assert not possible({"a": (5, ())}, calls, {"a": (5, ("x",))})


def test_so_it_is_if_both_were_created_here() -> None:
    calls = [
        call(0, "create a", 5, 0, 1),
        call(1, "open a", 5, 2, 3),
        call(0, "unlink a", 0, 4, 5),
        call(0, "create a", 5, 6, 7),
        call(1, "write x", 0, 8, 9),
    ]
    assert possible({}, calls, {"a": (5, ())})
    assert not possible({}, calls, {"a": (5, ("x",))})


def test_an_error_that_no_directory_gives_is_impossible() -> None:
    assert not possible({}, [call(0, "create a", -errno.EIO, 0, 1)], {})
    assert not possible({"a": (5, ())}, [call(0, "unlink a", -errno.EIO, 0, 1)], {"a": (5, ())})
