//! Is the identity of a workload revoked?

use opencluster_api::rest::WorkloadStatus;

use super::report::{Check, Group};

/// Nothing to say where nothing is revoked.
pub(super) fn group(workloads: &[WorkloadStatus]) -> Option<Group> {
    let mut group = Group::new("revoked workloads");
    for workload in workloads {
        let name = format!("workload {}/{}", workload.namespace, workload.name);
        if let Some(reason) = &workload.revoked {
            group.push(Check::warning(
                format!("{name} is not revoked"),
                format!("revoked: {reason}"),
                format!("on purpose? opencluster workload restore {}/{} lifts it", workload.namespace, workload.name),
            ));
            continue;
        }
        for key in workload.keys.iter().filter_map(|key| key.revoked.as_ref()) {
            group.push(Check::warning(
                format!("{name} has no revoked keys"),
                format!("a key of it is revoked: {key}"),
                "it goes with its certificate; the workload has another key meanwhile",
            ));
        }
    }
    (!group.checks.is_empty()).then_some(group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::check::report::Outcome;
    use crate::commands::workload::tests::ready;

    #[test]
    fn r31_what_is_revoked_is_a_warning() {
        assert!(group(&[ready("a")]).is_none());
        let mut revoked = ready("a");
        revoked.revoked = Some("stolen".into());
        let mut one_key = ready("b");
        one_key.keys[1].revoked = Some("stolen".into());
        let group = group(&[revoked, one_key, ready("c")]).expect("something to say");
        let results: Vec<_> = group.checks.iter().map(|check| check.result).collect();
        assert_eq!(results, [Outcome::Warning; 2]);
    }
}
