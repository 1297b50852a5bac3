"""Student files: what a student is, how it is read, written, attached, averaged and converted."""
