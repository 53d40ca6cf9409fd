//! Lists of processors as people write them.

/// Processors in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CpuList(pub(crate) Vec<u16>);

/// Parses numbers and ranges, like `0,2,4-7`, as taskset(1) takes them.
pub(crate) fn parse_cpus(text: &str) -> Result<CpuList, String> {
    let wrong = || format!("{text:?} is no list of CPUs; write one like 0,2,4-7");
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = match part.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(part)?, number(part)?),
        };
        if first > last {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    Ok(CpuList(cpus))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_ranges_keep_their_order() {
        let cpus = |text| parse_cpus(text).unwrap().0;
        assert_eq!(cpus("3"), [3]);
        assert_eq!(cpus("3,1"), [3, 1]);
        assert_eq!(cpus("0,4-6,2"), [0, 4, 5, 6, 2]);
        assert_eq!(cpus("7-7"), [7]);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", ",", "1,", "a", "2-1", "1-", "-1", "1-2-3", "70000"] {
            assert!(parse_cpus(text).is_err(), "{text}");
        }
    }
}
