"""Each pass alone, a file a pass: TVMScript before and after, and graphs that it must leave as they are."""
