"""Every file on disk: see README.md here."""
