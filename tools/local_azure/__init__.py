"""The local Azure emulator: as much of Azure ML as the real SDK needs to deploy this package here. See README.md."""
