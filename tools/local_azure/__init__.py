"""The local Azure emulator: the parts of Azure ML that the real SDK needs to deploy this package. See README.md."""
