# The commands of this repository. Each installs what is missing and says what it needs.

.PHONY: setup build test run bench bench-store bench-fill bench-rejoin bench-nbd bench-aoe

# Packages, and whether this machine can run a node at all. Does nothing where nothing is missing.
setup:
	@scripts/setup

build: setup
	cargo build --workspace

# The whole check: format, lints, unit tests, real processes, real etcd. CI calls it.
test: setup
	@scripts/test

# Three nodes on this machine with a volume over NBD, until Ctrl-C. METADATA=embedded|etcd PORT=10809 SIZE=4GiB DIR=./run
run: setup
	@scripts/run

# Torus beside the raw disk, qemu-nbd and nbdkit, on this machine, in one run, as tables, JSON and a page.
# ARGS="--quick", ARGS=--help, PEERS=ceph; see bench/README.md
bench: setup
	cargo build --release --workspace
	cargo run --release -p torus-bench -- $(ARGS) $(if $(PEERS),--peers $(PEERS))

# One shard alone beside the raw file: traffic, index, start, cleaning. ARGS="--quick", ARGS="--part start"; see bench/README.md
bench-store: setup
	cargo build --release -p torus-bench
	cargo run --release -p torus-bench -- store $(ARGS)

# A node filled to its end, overwritten ten times, trimmed, deleted, filled again. ARGS="--quick", ARGS="--times 3"
bench-fill: setup
	cargo build --release --workspace
	cargo run --release -p torus-bench -- fill $(ARGS)

# A node away for 30 s of writes, then back: seconds and bytes until all is in sync. ARGS="--quick"
bench-rejoin: setup
	cargo build --release --workspace
	cargo run --release -p torus-bench -- rejoin $(ARGS)

# NBD servers beside each other on one disk: qemu-nbd, nbdkit, torusblk serve, torus-engine --nbd. ARGS="--quick", ARGS=--null
bench-nbd: setup
	cargo build --release --workspace
	cargo run --release -p torus-bench -- nbd $(ARGS)

# AoE targets beside each other on virtual Ethernet: vblade and torusblk aoe, in memory, on the disk, replicated. ARGS=--null
bench-aoe: setup
	cargo build --release --workspace
	cargo run --release -p torus-bench -- aoe $(ARGS)
