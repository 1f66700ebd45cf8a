"""Cache, transactions, journal, replay: how metadata changes, all or nothing."""
