"""The report on runs as one HTML page, for `megagpt report`."""
