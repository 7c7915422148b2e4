//! How long an enrolment lasts: a node serves, is cordoned and drained when its end is near, and is then retired.
//!
//! Node and controller both keep this time, each by its own clock: the controller retires the node, and a node that the
//! controller does not reach in time ends by itself.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The shortest and the longest age, in seconds.
const LIMITS: std::ops::RangeInclusive<u64> = 10..=366 * 86_400;

/// The most that a node may reach, as in `maxAge: 12h`. Ten seconds to 366 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Age {
    seconds: u64,
}

/// Not an age.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an age is a number and s, m, h or d, for example 12h: from 10s to 366d")]
pub struct AgeError;

impl Age {
    /// So many seconds.
    pub fn from_seconds(seconds: u64) -> Result<Self, AgeError> {
        if LIMITS.contains(&seconds) { Ok(Self { seconds }) } else { Err(AgeError) }
    }

    /// In seconds.
    pub fn seconds(self) -> u64 {
        self.seconds
    }
}

impl FromStr for Age {
    type Err = AgeError;

    fn from_str(text: &str) -> Result<Self, AgeError> {
        let unit = text.char_indices().next_back().ok_or(AgeError)?;
        let seconds = match unit.1 {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            _ => return Err(AgeError),
        };
        let digits = &text[..unit.0];
        // Nothing else that `parse` takes: no sign.
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(AgeError);
        }
        let number: u64 = digits.parse().map_err(|_| AgeError)?;
        Self::from_seconds(number.checked_mul(seconds).ok_or(AgeError)?)
    }
}

/// In the largest unit that needs no fraction.
impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = match self.seconds {
            days if days.is_multiple_of(86_400) => (days / 86_400, 'd'),
            hours if hours.is_multiple_of(3600) => (hours / 3600, 'h'),
            minutes if minutes.is_multiple_of(60) => (minutes / 60, 'm'),
            seconds => (seconds, 's'),
        };
        write!(f, "{number}{unit}")
    }
}

impl Serialize for Age {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Age {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Where in its life an enrolment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It carries and takes work.
    Serving {
        /// Until it is cordoned.
        until_cordoned: Duration,
    },
    /// It takes nothing new, and what it has comes to its end.
    Cordoned,
    /// Over.
    Over,
}

/// An enrolment's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    age: Duration,
    drain: Duration,
}

impl Lifetime {
    /// An age that ends with at most so much time for draining; at most half of the life is spent on that.
    pub fn new(age: Age, drain: Duration) -> Self {
        let age = Duration::from_secs(age.seconds);
        Self { age, drain: drain.min(age / 2) }
    }

    /// Where it is, so long after the enrolment.
    pub fn phase(self, lived: Duration) -> Phase {
        let cordoned_at = self.age.saturating_sub(self.drain);
        if lived >= self.age {
            Phase::Over
        } else if lived >= cordoned_at {
            Phase::Cordoned
        } else {
            Phase::Serving { until_cordoned: cordoned_at.saturating_sub(lived) }
        }
    }

    /// What is left of it.
    pub fn left(self, lived: Duration) -> Duration {
        self.age.saturating_sub(lived)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_and_print() {
        for (text, seconds, printed) in
            [("10s", 10, "10s"), ("90s", 90, "90s"), ("120s", 120, "2m"), ("12h", 43_200, "12h"), ("24h", 86_400, "1d")]
        {
            let age: Age = text.parse().expect(text);
            assert_eq!((age.seconds(), age.to_string().as_str()), (seconds, printed));
        }
        for text in ["", "12", "h", "9s", "367d", "-1h", "+1h", "1.5h", "1 h", "99999999999999999999d", "1ä", "ä"] {
            text.parse::<Age>().expect_err(text);
        }
    }

    #[test]
    fn r04_a_life_is_served_drained_and_over() {
        let seconds = Duration::from_secs;
        let life = Lifetime::new(Age::from_seconds(100).expect("age"), seconds(30));
        assert_eq!(life.phase(seconds(0)), Phase::Serving { until_cordoned: seconds(70) });
        assert_eq!(life.phase(seconds(69)), Phase::Serving { until_cordoned: seconds(1) });
        assert_eq!(life.phase(seconds(70)), Phase::Cordoned);
        assert_eq!(life.phase(seconds(99)), Phase::Cordoned);
        assert_eq!(life.phase(seconds(100)), Phase::Over);
        assert_eq!((life.left(seconds(99)), life.left(seconds(200))), (seconds(1), seconds(0)));
        // A drain that is longer than the life leaves half of it to serve in.
        let short = Lifetime::new(Age::from_seconds(20).expect("age"), seconds(300));
        assert_eq!(short.phase(seconds(9)), Phase::Serving { until_cordoned: seconds(1) });
        assert_eq!(short.phase(seconds(10)), Phase::Cordoned);
    }
}
