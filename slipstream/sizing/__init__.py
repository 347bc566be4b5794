"""How much hardware: what hot sets would serve and take, before anything is trained.

From what profile counted alone: asked for a hit ratio, a share of hot samples, a budget or the memory of a device, it
gives the other three, under both policies, with memory by part on the device and on the host.

answers.py   questions and answers; what is served comes from access counts and profile's curve, by ops/hit_curve.py
speed.py     how fast it would train here: a few seconds of real steps, and what has to move
memory.py    bytes by part: the objects that would train, made without memory, by training/footprint.py
"""
