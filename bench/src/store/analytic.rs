//! What theory says of write amplification under random overwriting, as a yardstick for the measured one.
//!
//! The log is a ring of T blocks of which U are live: rho = U / T. A block copied by cleaning counts as a write, so that
//! amplification A = all writes / the client's. Classes of blocks: `data`, their part of the live blocks, and `writes`,
//! their part of the client's writes.
//!
//! * [`in_turn`]: segments are cleaned in the order they were written (FIFO, "LRU"). Within one turn of the ring the
//!   client writes T / A blocks, so a block of class i survives the turn with probability
//!   p = exp(-writes_i / (data_i · rho · A)), and A = sum of writes_i / (1 - p_i). For one class this is
//!   A = alpha / (alpha + W(-alpha · e^-alpha)), alpha = 1 / rho: P. Desnoyers, "Analytic modeling of SSD write
//!   performance", SYSTOR 2012; before him J. Menon, "A performance comparison of RAID-5 and log-structured arrays",
//!   HPDC 1995. With uniform writes and segments of many blocks greedy cleaning comes to the same (Desnoyers, section 4).
//! * [`apart`]: each class has segments of its own and the spare space is shared out in the best way: the bound of every
//!   policy that tells hot from cold, cost-benefit (M. Rosenblum, J. Ousterhout, "The design and implementation of a
//!   log-structured file system", SOSP 1991) among them. Also by Desnoyers, section 5.

/// A kind of block.
#[derive(Clone, Copy, Debug)]
pub struct BlockClass {
    pub data: f64,
    pub writes: f64,
}

pub const UNIFORM: [BlockClass; 1] = [BlockClass { data: 1.0, writes: 1.0 }];
/// A fifth of the blocks takes four fifths of the writes.
pub const EIGHTY_TWENTY: [BlockClass; 2] =
    [BlockClass { data: 0.2, writes: 0.8 }, BlockClass { data: 0.8, writes: 0.2 }];

/// Above every amplification that a store could live with.
const AMPLIFICATION_MAX: f64 = 1e6;
const STEPS: u32 = 200;

pub fn in_turn(classes: &[BlockClass], rho: f64) -> f64 {
    assert!(rho > 0.0 && rho < 1.0, "{rho} of the log is live");
    let excess = |amplification: f64| {
        let written = |class: &BlockClass| {
            let survives = (-class.writes / (class.data * rho * amplification)).exp();
            class.writes / (1.0 - survives)
        };
        classes.iter().map(written).sum::<f64>() - amplification
    };
    // The excess falls: at 1 it is positive, and for large A it is near rho · A - A.
    let (mut low, mut high) = (1.0, AMPLIFICATION_MAX);
    for _ in 0..STEPS {
        let middle = (low + high) / 2.0;
        if excess(middle) > 0.0 { low = middle } else { high = middle }
    }
    low
}

/// Of two classes; of one it is the same as `in_turn`.
pub fn apart(classes: &[BlockClass], rho: f64) -> f64 {
    let [first, second] = classes else { return in_turn(classes, rho) };
    let of = |class: &BlockClass, share: f64| class.writes * in_turn(&UNIFORM, class.data * rho / share);
    // The share of the log that the first class has: at least its own blocks, at most what the other leaves.
    let (low, high) = (first.data * rho, 1.0 - second.data * rho);
    let shares = (1..1000).map(|step| low + (high - low) * f64::from(step) / 1000.0);
    shares.map(|share| of(first, share) + of(second, 1.0 - share)).fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 0.01, "{found}, expected {expected}");
    }

    /// alpha / (alpha + W(-alpha e^-alpha)) worked out by hand: at A = 2 a block survives with e^(-alpha/2) = 1/2.
    #[test]
    fn uniform_writes_give_the_published_values() {
        close(in_turn(&UNIFORM, 1.0 / (2.0 * 2f64.ln())), 2.0);
        close(in_turn(&UNIFORM, 0.9), 5.18);
        close(in_turn(&UNIFORM, 0.5), 1.255);
    }

    #[test]
    fn hot_and_cold_mixed_cost_more_than_uniform_and_apart_less() {
        for rho in [0.7, 0.8, 0.9] {
            let uniform = in_turn(&UNIFORM, rho);
            assert!(in_turn(&EIGHTY_TWENTY, rho) > uniform);
            assert!(apart(&EIGHTY_TWENTY, rho) < uniform);
        }
    }

    #[test]
    fn classes_that_are_alike_are_one() {
        let half = BlockClass { data: 0.5, writes: 0.5 };
        close(in_turn(&[half, half], 0.8), in_turn(&UNIFORM, 0.8));
        close(apart(&[half, half], 0.8), in_turn(&UNIFORM, 0.8));
    }
}
