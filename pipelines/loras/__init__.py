"""LoRAs of every layout: read a file, find the places of its layers in a network, and handle what peft attached."""
