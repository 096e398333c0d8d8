"""From files to histories: readers, the core, splits and frozen candidate lists. Knows no model and no encoder."""
