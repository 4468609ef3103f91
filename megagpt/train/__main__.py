"""`python -m megagpt.train`, `deepspeed --module megagpt.train`: the program of launch/pretrain.py, once installed."""

from megagpt.cli.pretrain import main

if __name__ == "__main__":
    main()
