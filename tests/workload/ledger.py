"""A ledger in sqlite: concurrent transfers whose acknowledgements are kept outside the volume.

    python -m tests.workload.ledger LOG DATABASE COUNT

makes COUNT transfers between accounts (0: until an error or SIGTERM), each in a transaction, and
appends the number of each that was committed to LOG. `audit` holds the database against the logs:
integrity, no money made or lost, no committed transfer missing.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import sys
from pathlib import Path

ACCOUNTS = 50
OPENING_BALANCE = 1000


def create(database: Path, journal: str) -> None:
    """A new ledger; ``journal`` is sqlite's journal mode (not WAL: that wants a shared mapping)."""
    with sqlite3.connect(database) as connection:
        connection.execute(f"PRAGMA journal_mode={journal}")
        connection.execute("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER)")
        connection.execute(
            "CREATE TABLE transfer (number TEXT PRIMARY KEY, source, target, amount, note)"
        )
        connection.executemany(
            "INSERT INTO account VALUES (?, ?)", [(n, OPENING_BALANCE) for n in range(ACCOUNTS)]
        )
    connection.close()


def transfer(connection: sqlite3.Connection, number: str, chooser: random.Random) -> None:
    """One transaction. Raises `sqlite3.Error`, and nothing was changed."""
    source, target = chooser.sample(range(ACCOUNTS), 2)
    amount = chooser.randrange(100)
    note = "n" * chooser.randrange(3000)
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        change = "UPDATE account SET balance = balance + ? WHERE id = ?"
        connection.execute(change, (-amount, source))
        connection.execute(change, (amount, target))
        connection.execute(
            "INSERT INTO transfer VALUES (?, ?, ?, ?, ?)", (number, source, target, amount, note)
        )


def audit(database: Path, logs: list[Path]) -> list[str]:
    """What is wrong with the ledger: nothing, if all is well."""
    connection = sqlite3.connect(database)
    try:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
        wrong = [] if verdict == "ok" else [str(verdict)]
        (total,) = connection.execute("SELECT sum(balance) FROM account").fetchone()
        if total != ACCOUNTS * OPENING_BALANCE:
            wrong.append(f"{total} in all accounts, not {ACCOUNTS * OPENING_BALANCE}")
        there = {number for (number,) in connection.execute("SELECT number FROM transfer")}
    finally:
        connection.close()
    committed = {line for log in logs if log.exists() for line in log.read_text().splitlines()}
    return wrong + [f"transfer {number} is lost" for number in sorted(committed - there)]


def main(log_path: str, database: str, count: str) -> int:
    """Make transfers; return the exit status, 2 if the database could not be used any more."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    name, limit = Path(log_path).name, int(count)
    chooser = random.Random(name)
    made = 0
    with Path(log_path).open("a", buffering=1) as log:
        try:
            connection = sqlite3.connect(database, timeout=60, isolation_level=None)
            # FULL does not sync the directory after the journal is unlinked, which is the commit.
            connection.execute("PRAGMA synchronous=EXTRA")
            # Once a dead mount was detached, its path leads to the directory below it. There the
            # journal does not exist, and sqlite takes ENOENT for a journal that was removed: it
            # would report a commit that never reached the volume. So ask the mount itself whether
            # it lived until now.
            alive = os.open(Path(database).parent, os.O_RDONLY | os.O_DIRECTORY)
            while made < limit or not limit:
                number = f"{name}-{made}"
                transfer(connection, number, chooser)
                os.fstat(alive)
                log.write(number + "\n")
                made += 1
            connection.close()
        except (sqlite3.Error, OSError) as error:
            print(f"ledger: {error} after {made} transfers", flush=True)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
