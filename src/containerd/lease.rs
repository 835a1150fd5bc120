//! Leases: what is made under one is kept from the garbage collector until it is deleted or expires.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use containerd_client::services::v1::{
    CreateRequest, DeleteRequest, ListRequest, leases_client::LeasesClient,
};

use super::client::{Asked, Namespace, gone};

impl Namespace {
    /// Makes a lease that containerd drops by itself after `life`, should nobody delete it.
    pub async fn lease_create(&self, id: &str, life: Duration) -> Result<()> {
        let expire = rfc3339(SystemTime::now() + life);
        let labels = [("containerd.io/gc.expire".to_string(), expire)].into();
        let request = self.request(CreateRequest { id: id.into(), labels });
        let answer = LeasesClient::new(self.channel.clone()).create(request).await;
        answer.asked(|| format!("creating lease {id}"))?;
        Ok(())
    }

    /// Deletes a lease; fine if there is none. `sync`: returns after what nothing else keeps is removed.
    pub async fn lease_delete(&self, id: &str, sync: bool) -> Result<()> {
        let request = self.request(DeleteRequest { id: id.into(), sync });
        let answer = LeasesClient::new(self.channel.clone()).delete(request).await;
        gone(answer.asked(|| format!("deleting lease {id}")))
    }

    /// The leases' ids.
    pub async fn lease_list(&self) -> Result<Vec<String>> {
        let request = self.request(ListRequest { filters: Vec::new() });
        let answer = LeasesClient::new(self.channel.clone()).list(request).await;
        Ok(answer.asked(|| "listing leases".into())?.leases.into_iter().map(|l| l.id).collect())
    }
}

/// A time as RFC 3339 in UTC, whole seconds. Days to civil date after H. Hinnant's `civil_from_days`.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let at = |s| rfc3339(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_795_235_639), "2026-11-21T04:33:59Z");
        assert_eq!(at(4_107_542_399), "2100-02-28T23:59:59Z");
    }
}
