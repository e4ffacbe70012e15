"""Other packages' formats and classes, each in a file of its own; nothing here is imported unless it is asked for."""
