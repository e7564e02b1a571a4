"""A report as one HTML page: nothing outside it is loaded, and everything from results is escaped."""
