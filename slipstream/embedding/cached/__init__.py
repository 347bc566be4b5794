"""A table in host memory behind a software cache of rows on the device."""
