"""Object stores: whole objects by their URL, read and written with patience."""
