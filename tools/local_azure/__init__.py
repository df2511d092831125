"""Azure on the desk: as much of Azure ML as the real SDK needs to deploy this package on loopback. See README.md."""
