//! What the gate found, as CI systems read it.

use anyhow::Result;
use quick_junit::{NonSuccessKind, Report, TestCase, TestCaseStatus, TestSuite};
use vmafx_bypass::bench::Verdict;

use super::described;

/// JUnit's XML: a test for each comparison.
pub fn xml(verdict: &Verdict) -> Result<String> {
    let mut report = Report::new("vmafx-bypass bench");
    for (name, by_baseline) in [("gate", false), ("baseline", true)] {
        let mut suite = TestSuite::new(name);
        let checks = verdict.checks.iter();
        for check in checks.filter(|check| check.baseline.is_some() == by_baseline) {
            let text = described(check);
            let status = if check.pass {
                TestCaseStatus::success()
            } else {
                let mut missed = TestCaseStatus::non_success(NonSuccessKind::Failure);
                missed.set_message(text.clone()).set_type("too slow");
                missed
            };
            let name = format!(
                "{} {} of {} by {}",
                check.engine.name(),
                check.pattern.name(),
                check.block_size,
                check.streams
            );
            let mut case = TestCase::new(name, status);
            case.set_system_out(text);
            suite.add_test_case(case);
        }
        if suite.tests > 0 {
            report.add_test_suite(suite);
        }
    }
    Ok(report.to_string()?)
}
