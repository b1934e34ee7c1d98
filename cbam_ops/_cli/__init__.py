"""The commands of `cbam-ops`, one module each; `cbam_ops.__main__` reads the arguments."""
