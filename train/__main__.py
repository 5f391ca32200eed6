"""`python -m longtake.train experiment=… key=value …`"""

from longtake.train.main import main

if __name__ == "__main__":
    main()
