"""8-bit and 4-bit weights: codes, GPTQ, calibration."""
