"""How fast it is: measurements that print a table, never tests."""
