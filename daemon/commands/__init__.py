"""One module a group of commands; each has `add(commands)`, which declares them, and a function for each."""
