"""One image of 1024 tokens with one thread and with two: what more threads gain where there is no batch.

It measures the three operations with the command line of their own benchmarks. Example:

    python benchmarks/bench_scaling.py --threads 1,2
"""

import bench_attention_gram
import bench_pairwise_cosine
import bench_reattention
import cli


def main():
    parser = cli.parser(__doc__, providers=("native", "eager"), threads=(1, 2))
    parser.add_argument("--tokens", type=int, default=1024, help="in the image; default: 1024")
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {args.tokens}")
    attention = (1, 12, args.tokens, 64)
    chosen = [
        bench_reattention.workload(attention),
        bench_reattention.workload(attention, norm="batch"),
        bench_attention_gram.workload(attention),
        bench_pairwise_cosine.workload((1, args.tokens, 768)),
    ]
    cli.run(parser, args, chosen)


if __name__ == "__main__":
    main()
