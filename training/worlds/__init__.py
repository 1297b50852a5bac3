"""The small worlds where every picture can be checked, and how their teachers were trained."""
