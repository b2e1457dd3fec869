"""The service: configuration, intake, ledger, worker, supervisor, bus, command line."""
