"""`accelerate launch -m lorafuse_train train --fused_model FUSED --dataset_base_path DATA --output_path OUT`."""

from lorafuse_train.cli import main

if __name__ == "__main__":
    main()
