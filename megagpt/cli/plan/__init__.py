"""`megagpt plan`: memory, time and traffic by arithmetic, and the largest micro-batch by real steps."""
