"""The commands of `cbam-ops`, one module each; `arguments` reads what follows the name."""
