"""What is measured. Each module runs alone, prints a table, and writes JSON with --json."""
