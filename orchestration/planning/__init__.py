"""Time, memory and price of a DDPO run, before there is one."""
