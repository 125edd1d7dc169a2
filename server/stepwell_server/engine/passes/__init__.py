"""Jobs run: the loop of each model drains the inbox, chooses, runs a pass, has it committed and answered.

It may touch executors and rows of claimed sessions. How sessions come and go is not its affair.
"""
