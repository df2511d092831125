"""Azure ML's inference server (azmlinfsrv): its routes and shutdown, and starting it as Azure does."""
