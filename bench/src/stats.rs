//! Medians over rounds, and how sure we are of them.
//!
//! Rounds are paired: in one round every contender ran within the same minute. So ratios are bootstrapped by drawing
//! whole rounds, which keeps the machine's slow drifts out of the interval. The generator is seeded with a constant:
//! the same report always gives the same interval.

use serde::{Deserialize, Serialize};

const RESAMPLES: usize = 4000;
const CONFIDENCE: f64 = 0.95;

/// One figure over all rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The median of the rounds.
    pub median: f64,
    /// The smallest round.
    pub min: f64,
    /// The largest round.
    pub max: f64,
    /// 95 % bootstrap interval of the median.
    pub ci95: [f64; 2],
    /// Every round, in order.
    pub values: Vec<f64>,
}

impl Summary {
    /// Condenses the rounds; `None` when there are none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let median = median(values)?;
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let ci95 = bootstrap(values.len(), |draw| self::median(&pick(values, draw)))?;
        Some(Self { median, min, max, ci95, values: values.to_vec() })
    }
}

/// The ratio of two contenders' medians.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Median of the one over the median of the other.
    pub ratio: f64,
    /// 95 % bootstrap interval over paired rounds.
    pub ci95: [f64; 2],
}

impl Ratio {
    /// Of paired rounds: `ours[i]` and `theirs[i]` come from round `i`. Surplus rounds of either are left out.
    pub fn of(ours: &[f64], theirs: &[f64]) -> Option<Self> {
        let rounds = ours.len().min(theirs.len());
        let (ours, theirs) = (&ours[..rounds], &theirs[..rounds]);
        let ratio = quotient(median(ours)?, median(theirs)?)?;
        let ci95 = bootstrap(rounds, |draw| quotient(median(&pick(ours, draw))?, median(&pick(theirs, draw))?))?;
        Some(Self { ratio, ci95 })
    }
}

/// The middle value, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

fn quotient(a: f64, b: f64) -> Option<f64> {
    (b != 0.0).then(|| a / b)
}

fn pick(values: &[f64], draw: &[usize]) -> Vec<f64> {
    draw.iter().map(|&i| values[i]).collect()
}

/// Percentile bootstrap of `statistic` over draws with replacement from `rounds` rounds.
fn bootstrap(rounds: usize, statistic: impl Fn(&[usize]) -> Option<f64>) -> Option<[f64; 2]> {
    if rounds == 0 {
        return None;
    }
    let mut random = SplitMix(0x0c5e_ed00_2026_0001);
    let mut results = Vec::with_capacity(RESAMPLES);
    let mut draw = vec![0; rounds];
    for _ in 0..RESAMPLES {
        draw.fill_with(|| random.below(rounds));
        if let Some(value) = statistic(&draw) {
            results.push(value);
        }
    }
    results.sort_by(f64::total_cmp);
    let at = |share: f64| results.get(((results.len().saturating_sub(1)) as f64 * share).round() as usize).copied();
    let tail = (1.0 - CONFIDENCE) / 2.0;
    Some([at(tail)?, at(1.0 - tail)?])
}

/// SplitMix64: small, well mixed, and the same on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`; the bias of multiply-shift is below 2^-50 for the few rounds that there are.
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn an_interval_of_equal_rounds_is_a_point() {
        let s = Summary::of(&[3.0; 5]).unwrap();
        assert_eq!((s.median, s.ci95), (3.0, [3.0, 3.0]));
    }

    #[test]
    fn the_interval_holds_the_median_and_widens_with_noise() {
        let calm = Summary::of(&[100.0, 101.0, 99.0, 100.5, 99.5, 100.2, 99.8]).unwrap();
        let noisy = Summary::of(&[100.0, 130.0, 70.0, 115.0, 85.0, 106.0, 94.0]).unwrap();
        for s in [&calm, &noisy] {
            assert!(s.ci95[0] <= s.median && s.median <= s.ci95[1], "{s:?}");
            assert!(s.min <= s.ci95[0] && s.ci95[1] <= s.max, "{s:?}");
        }
        assert!(noisy.ci95[1] - noisy.ci95[0] > 10.0 * (calm.ci95[1] - calm.ci95[0]));
    }

    #[test]
    fn paired_rounds_cancel_a_drift_of_the_machine() {
        // The machine slows down to half over the run, alike for both: the ratio is 2 without any doubt.
        let theirs = [100.0, 90.0, 80.0, 70.0, 60.0, 50.0, 45.0];
        let ours: Vec<f64> = theirs.iter().map(|v| v * 2.0).collect();
        let r = Ratio::of(&ours, &theirs).unwrap();
        assert!((r.ratio - 2.0).abs() < 1e-9 && (r.ci95[0] - 2.0).abs() < 1e-9 && (r.ci95[1] - 2.0).abs() < 1e-9);
    }

    #[test]
    fn the_bootstrap_covers_the_truth_about_as_often_as_it_claims() {
        // 200 experiments of 15 rounds each with a true median of 0: the 95 % interval must miss rarely.
        let mut random = SplitMix(7);
        let mut covered = 0;
        for _ in 0..200 {
            let rounds: Vec<f64> =
                (0..15).map(|_| (0..4).map(|_| random.below(2001) as f64 - 1000.0).sum::<f64>()).collect();
            let ci = Summary::of(&rounds).unwrap().ci95;
            covered += i32::from(ci[0] <= 0.0 && 0.0 <= ci[1]);
        }
        assert!((178..=200).contains(&covered), "{covered} of 200");
    }

    #[test]
    fn no_rounds_or_a_zero_divisor_give_no_ratio() {
        assert_eq!(Ratio::of(&[], &[1.0]), None);
        assert_eq!(Ratio::of(&[1.0], &[0.0]), None);
        assert!(Summary::of(&[]).is_none());
    }
}
