"""Our ops and their peers side by side."""
